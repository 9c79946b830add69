"""The options under ``calibration`` in a config. Importing this loads no Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qat.ptq.base import PTQMethod
from qat.ranges import Range, Seed, check_fields


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration, alone or before training, validation or prediction.

    Args:
        method: how quantizers are calibrated; null is InitSteps, which starts each by the init that its spec names.
        images: number of images, which get the evaluation transform.
        batch_size: images per forward pass.
        seed: seeds the choice of the images.
        cache_gb: 10^9 bytes that the inputs and outputs of a unit, for all images, may take in memory; beyond that,
            they are kept in the memory of the host if the device has its own, else in files beside the checkpoint.
    """

    method: PTQMethod | None = None
    images: Annotated[int, Range(1, 10_000_000)] = 64
    batch_size: Annotated[int, Range(1, 100_000)] = 32
    seed: Seed = 0
    cache_gb: Annotated[float, Range(above=0, high=1_000_000)] = 8.0

    def __post_init__(self) -> None:
        check_fields(self, "calibration.")
