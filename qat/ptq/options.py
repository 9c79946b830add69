"""The options under ``calibration`` in a config. Importing this loads no Lightning."""

from __future__ import annotations

from dataclasses import dataclass

from qat.ptq.base import PTQMethod


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration before training, validation or prediction.

    Args:
        method: how quantizers are calibrated; null is InitSteps, which starts each by the init that its spec names.
        images: number of training images, which get the evaluation transform.
        batch_size: images per forward pass.
        seed: seeds the choice of the images.
    """

    method: PTQMethod | None = None
    images: int = 64
    batch_size: int = 32
    seed: int = 0
