"""Hadamard rotation of the heads of attention: outliers are spread over all channels of a head."""

from __future__ import annotations

from dataclasses import dataclass

from qat.errors import QatError
from qat.ptq.hadamard import has_hadamard, rotatable, rotate_heads
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work
from qat.ranges import check_fields
from qat.sites.insert import quantizers


@dataclass
class RotateHeads(Step):
    """Rotate q with k, and v with the layer behind it, of every attention that allows it.

    Args:
        optional: a model without such an attention is left as it is; otherwise it is refused.
    """

    optional: bool = False

    stage = Stage.REWRITE
    changes_weights = True

    def __post_init__(self) -> None:
        check_fields(self)

    def begin(self, work: Work) -> None:
        """Find the attentions; QatError where there is none."""
        self._names = []
        for name, module in work.model.named_modules():
            sites = [site for site, _ in quantizers(work.model) if site.startswith(f"{name}.")]
            if any(rotatable(module)) and has_hadamard(int(module.head_dim)) and sites and work.is_open(sites):
                self._names.append(name)
        if work.wanted and not self._names and not self.optional:
            raise QatError("RotateHeads finds no attention that it can rotate in this model: leave it out")

    def unit(self, here: UnitWork) -> None:
        """Rotate the attentions of a unit."""
        inside = tuple(f"{name}." for name in here.unit.modules)
        for name in self._names:
            if name.startswith(inside):
                rotate_heads(here.model, name)
