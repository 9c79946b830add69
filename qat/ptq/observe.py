"""Calibration by observers, the baselines of FQ-ViT: one pass of the float model gives every site its range."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from qat.progress import Progress
from qat.ptq.base import PTQMethod, raise_unless_calibrated, stream, uncalibrated
from qat.ptq.running_range import Observer, running_range_for
from qat.ptq.search import calibrate_
from qat.ranges import Range, Seed, check_fields


@dataclass
class Observe(PTQMethod):
    """Weights get the range of all their values, whatever the observer; activations the range that it follows.

    Args:
        observer: ``minmax``: the range of all batches. ``ema``: a moving average of the ranges of the batches.
            ``percentile``: a moving average of the quantiles 0.00001 and 0.99999. ``omse``: the min-max range, shrunk
            to the least squared error.
        samples: values kept per activation site and batch, where a search or a quantizer needs them.
        seed: seeds the draw of these values.
    """

    observer: Observer = "minmax"
    samples: Annotated[int, Range(1, 1_000_000_000)] = 100_000
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate every site that is not calibrated yet; QatError if no image reaches one of them."""
        weights, activations = uncalibrated(model)
        for name, weight, quantizer in weights:
            calibrate_(quantizer, quantizer.grouped(weight.float()))
            raise_unless_calibrated(name, quantizer)
        ranges = {
            name: running_range_for(quantizer, self.observer, self.samples, self.seed)
            for name, quantizer in activations.items()
        }
        stream(model, batches, activations, lambda name, rows: ranges[name].update(rows))
        with Progress("calibrated sites", len(activations), shown=bool(activations)) as progress:
            for name, quantizer in activations.items():
                ranges.pop(name).calibrate_()
                raise_unless_calibrated(name, quantizer)
                progress.advance(1)
