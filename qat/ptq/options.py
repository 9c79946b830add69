"""The options of a calibration: what stands under ``calibration`` in a config. Nothing here loads Lightning."""

from __future__ import annotations

from dataclasses import dataclass

from qat.ptq.base import PTQMethod


@dataclass(frozen=True)
class CalibrationOptions:
    """How the quantizers are filled before training, validation or prediction.

    Args:
        method: how the quantizers are filled; InitSteps, each by the init that its spec names, when null.
        images: training images, with the evaluation transform.
        batch_size: images in one forward.
        seed: which images.
    """

    method: PTQMethod | None = None
    images: int = 64
    batch_size: int = 32
    seed: int = 0
