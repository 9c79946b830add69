"""Calibration in the order of the network: every site of a unit sees inputs that the sites before it have quantized.

Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from qat.ptq.work import Reached
from qat.quantizers import Quantizer
from qat.sites.family import Unit
from qat.sites.hooks import watching

CalibrateSite = Callable[[str, Quantizer, Tensor], None]  # name, quantizer, samples (G, n)


@torch.no_grad()
def calibrate_in_order(
    unit: Unit, tensors: Sequence[Tensor], sites: Mapping[str, Quantizer], calibrate_site: CalibrateSite
) -> None:
    """Calibrate activation sites of a unit one after the other and switch each on as soon as it is calibrated.

    Only the tensor of one site is kept for all batches, so the unit is run again, up to the site, for each of its
    sites. A site that a unit visits more than once is calibrated on the tensors of all visits; sites between two visits
    are still off then.

    Args:
        unit: in evaluation mode; its weights are calibrated, or their quantizers are switched off.
        tensors: what reaches the unit (B, ...).
        sites: those of the unit that are to be calibrated, which are switched off first; others are left as they are.
        calibrate_site: called once for every site, with all values of its tensor.
    """
    if not sites:
        return
    for quantizer in sites.values():
        quantizer.enabled = False
    for name, visits in _visits(unit, tensors[0], sites).items():
        quantizer = sites[name]
        calibrate_site(name, quantizer, _inputs(unit, tensors, name, quantizer, visits))
        quantizer.enabled = True


def _visits(unit: Unit, x: Tensor, sites: Mapping[str, Quantizer]) -> Counter[str]:
    """How often a unit reaches each site, in the order in which it first reaches them, measured on one image."""
    seen: Counter[str] = Counter()
    with watching(sites, before=lambda name, _: seen.update([name])):
        unit.run(x[:1])
    return seen


def _inputs(unit: Unit, tensors: Sequence[Tensor], name: str, quantizer: Quantizer, visits: int) -> Tensor:
    """The inputs of one site (G, n), over all batches and all visits of a batch."""
    rows: list[Tensor] = []

    def stop(_: str, args: tuple[Tensor, ...]) -> None:
        rows.append(quantizer.grouped(args[0].float()))
        if len(rows) % visits == 0:
            raise Reached

    with watching({name: quantizer}, before=stop):
        for x in tensors:
            with suppress(Reached):
                unit.run(x)
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
