"""The default method: every quantizer starts from samples of its own tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from qat.ptq.base import PTQMethod, stream, uncalibrated
from qat.ptq.running_range import Samples
from qat.ranges import Range, Seed, check_fields


@dataclass
class InitSteps(PTQMethod):
    """Weights, then activations of the float model, start by the ``init`` that their spec names.

    Args:
        samples: values kept per activation site, group and batch.
        seed: seeds the draw of these values.
    """

    samples: Annotated[int, Range(1, 1_000_000_000)] = 100_000
    seed: Seed = 0

    single_device = False

    def __post_init__(self) -> None:
        check_fields(self)

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate every site that is not calibrated yet; QatError if no image reaches one of them."""
        weights, activations = uncalibrated(model)
        for _, weight, quantizer in weights:
            quantizer.init_from(quantizer.grouped(weight.float()))
        generator = torch.Generator().manual_seed(self.seed)
        seen = {name: Samples(self.samples, generator) for name in activations}
        stream(model, batches, activations, lambda name, rows: seen[name].update(rows), shown=False)  # on every rank
        for name, quantizer in activations.items():
            quantizer.init_from(seen.pop(name).joined())
