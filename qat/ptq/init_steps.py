"""The plain method: every quantizer starts from samples of its own tensor. G groups, n samples in a group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.insert import quantizers, switched_off
from qat.ptq.base import PTQMethod
from qat.quantizers import Quantizer


@dataclass
class InitSteps(PTQMethod):
    """Weights first, then activations of the float model, each by the ``init`` that its spec names.

    Args:
        samples: values kept per activation site, group and batch.
        seed: of the draw.
    """

    samples: int = 100_000
    seed: int = 0

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate every site that is not calibrated yet; QatError for a site that no image reaches."""
        todo = {name: quantizer for name, quantizer in quantizers(model) if not quantizer.calibrated}
        for name, quantizer in todo.items():
            if not quantizer.layout.batched:
                parent, _, site = name.rpartition(".")
                weight = getattr(model.get_submodule(parent), site.removesuffix("_quant"))
                quantizer.init_from(quantizer.grouped(weight.float()))
        activations = {name: quantizer for name, quantizer in todo.items() if quantizer.layout.batched}
        with switched_off(q for _, q in quantizers(model)), sampling(activations, self.samples, self.seed) as seen:
            for images in batches if activations else ():
                model(images)
        for name, quantizer in activations.items():
            if not seen[name]:
                raise QatError(f"no calibration image reached {name!r}: raise calibration.images")
            quantizer.init_from(torch.cat(seen.pop(name), dim=1))


@contextmanager
def sampling(wanted: dict[str, Quantizer], count: int, seed: int) -> Iterator[dict[str, list[Tensor]]]:
    """Collect (G, n) random values of each quantizer's input inside the block, at most ``count`` a batch and group."""
    seen: dict[str, list[Tensor]] = {name: [] for name in wanted}
    generator = torch.Generator().manual_seed(seed)

    def keep(name: str, quantizer: Quantizer, x: Tensor) -> None:
        rows = quantizer.grouped(x.float())
        if rows.shape[1] > count:
            rows = rows[:, torch.randint(rows.shape[1], (count,), generator=generator).to(rows.device)]
        seen[name].append(rows.clone())

    hooks = [
        quantizer.register_forward_pre_hook(lambda module, args, name=name: keep(name, module, args[0]))
        for name, quantizer in wanted.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
