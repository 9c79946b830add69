"""Calibration in the order of the network: every site sees inputs that the sites before it have quantized.

Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.quantizers import Quantizer
from qat.sites.family import Unit, family_of
from qat.sites.hooks import watching
from qat.sites.insert import quantizers

CalibrateSite = Callable[[str, Quantizer, Tensor], None]  # name, quantizer, samples (G, n)


class Reached(Exception):
    """Ends a forward at the last visit of the site whose inputs are wanted."""


@torch.no_grad()
def calibrate_in_order(
    model: nn.Module, batches: Iterable[Tensor], calibrate_site: CalibrateSite, wanted: Iterable[str]
) -> None:
    """Calibrate activation sites one after the other and switch each on as soon as it is calibrated.

    The model is walked unit by unit; only the inputs of one unit, and the tensor of one site, are kept for all batches,
    so a unit is run again, up to the site, for each of its sites. A site that a unit visits more than once is
    calibrated on the tensors of all visits; wanted sites between two visits are still off then.

    Args:
        model: in evaluation mode; the weights that are to be quantized are calibrated.
        batches: normalized images (B, 3, S, S).
        calibrate_site: called once for every wanted site, with all values of its tensor.
        wanted: names of activation sites, which are switched off first. Other sites are left as they are.

    Raises:
        QatError: no unit reaches a wanted site.
    """
    waiting = set(wanted)
    sites = {name: quantizer for name, quantizer in quantizers(model) if name in waiting}
    for quantizer in sites.values():
        quantizer.enabled = False
    tensors = list(batches)
    with Progress("activation sites", len(sites)) as progress:
        for unit in family_of(model).units(model):
            for name, visits in _visits(unit, tensors[0], sites).items():
                quantizer = sites[name]
                calibrate_site(name, quantizer, _inputs(unit, tensors, name, quantizer, visits))
                quantizer.enabled = True
                waiting.discard(name)
                progress.advance(1)
            tensors = [unit.run(x) for x in tensors]
    if waiting:
        raise QatError(f"no calibration image reached {min(waiting)!r}, or its model does not say in which unit it is")


def _visits(unit: Unit, x: Tensor, sites: dict[str, Quantizer]) -> Counter[str]:
    """How often a unit reaches each site, in the order in which it first reaches them, measured on one image."""
    seen: Counter[str] = Counter()
    with watching(sites, before=lambda name, _: seen.update([name])):
        unit.run(x[:1])
    return seen


def _inputs(unit: Unit, tensors: list[Tensor], name: str, quantizer: Quantizer, visits: int) -> Tensor:
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
