"""What the training module hands on: the numbers of a step, and predictions. Shapes: B images."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qat.data.images import TopK


class Prediction(NamedTuple):
    """What `predict_step` returns for a batch."""

    paths: tuple[str, ...]
    classes: Tensor  # (B, 5) int64, most probable first
    probs: Tensor  # (B, 5)


class StepRecord(NamedTuple):
    """What a batch has to log. Keeping it costs nothing: numbers are computed, and fetched, only in a logged step."""

    loss: Tensor  # without penalties
    soft_labels: Tensor | TopK | None
    penalties: dict[str, Tensor]  # weighted, by the name of the regularizer
    rates: dict[str, float]
    crops: int
    due: bool  # Lightning writes the metrics of this step
