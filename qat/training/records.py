"""What the training module hands on: the numbers of a step, and predictions. Shapes: B images."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qat.data.images import TopK
from qat.training.losses import entropy


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

    def losses(self, classes: int) -> dict[str, Tensor]:
        """The loss by its name in the log; with soft labels, also what a perfect student would have, and the rest."""
        losses = {"train/loss": self.loss}
        if self.soft_labels is not None:
            floor = entropy(self.soft_labels, classes)
            losses |= {"train/label_entropy": floor, "train/kl": self.loss - floor}
        return losses
