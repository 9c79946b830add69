"""The default method: every quantizer starts from samples of its own tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.ptq.base import PTQMethod, stream, uncalibrated
from qat.ptq.running_range import Samples


@dataclass
class InitSteps(PTQMethod):
    """Weights, then activations of the float model, start by the ``init`` that their spec names.

    Args:
        samples: values kept per activation site, group and batch.
        seed: seeds the draw of these values.
    """

    samples: int = 100_000
    seed: int = 0

    single_device = False

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
