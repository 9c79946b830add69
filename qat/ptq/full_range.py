"""First parameters: the full range of every tensor, the largest step that a search starts from. Shapes: G groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.ptq.search import Ranges
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.quantizers import Quantizer
from qat.sites.hooks import watching
from qat.sites.insert import switched_off


@dataclass
class FullRange(Step):
    """A range from the least to the largest value of all images; what has no range keeps the start of its own.

    PTQ4ViT (arXiv 2111.12293) starts there: a symmetric step is max |x| / (2**(bits - 1) - 1/2).
    """

    stage = Stage.INITIALIZE

    def unit(self, here: UnitWork) -> None:
        """Fill the sites of a unit."""
        for name, (low, high) in full_ranges(here).items():
            here.work.wanted[name].set_range_(low, high)


def follows_range(quantizer: Quantizer) -> bool:
    """Whether all parameters of a quantizer follow from a range."""
    return quantizer.ranged and not quantizer.refines


@torch.no_grad()
def full_ranges(here: UnitWork) -> dict[str, Ranges]:
    """Low and high (G,) of every wanted tensor of a unit whose quantizer follows a range, while all sites are off."""
    found: dict[str, Ranges] = {}

    def update(name: str, rows: Tensor) -> None:
        low, high = rows.amin(1), rows.amax(1)
        if name in found:
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = low, high

    def see(name: str, args: tuple[Any, ...]) -> None:
        update(name, sites[name].grouped(args[0].detach().float()))

    for name, weight, quantizer in here.wanted_weights():
        if follows_range(quantizer):
            update(name, quantizer.grouped(weight.detach().float()))
    sites = {name: site for name, site in here.wanted_activations().items() if follows_range(site)}
    with watching(sites, before=see), switched_off(here.off):
        for x in here.inputs:
            here.unit.run(x)
    return found
