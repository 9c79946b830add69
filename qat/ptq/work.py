"""A calibration that is under way, and the choice of samples.

Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.progress import Progress
from qat.ptq.base import PTQMethod
from qat.ptq.importance import Importance
from qat.quantizers import Quantizer, Spec
from qat.sites.insert import quantizers

Prefix = Literal["quantized", "float"]
SAMPLES = 20_000  # values of each group from which first parameters are chosen


@dataclass
class Work:
    """A calibration that is under way.

    Args:
        model: in evaluation mode.
        wanted: the sites that it fills, by name: those that were not calibrated when it began.
        method: gets what there is to report.
        reached: names of the activation sites that an image has reached so far.
        importance: how much the rows of the output of every layer matter; empty where no step asks.
        importance_share: by which share rows count by it; they count alike for the rest.
        logits: those of the float model (B, classes), for every batch; empty where no step asks.
        progress: counts ticks: one for every unit, and those of `Step.ticks`.

    Attributes:
        recipe: what the recipe says of the wanted sites, whatever is put in their place.
    """

    model: nn.Module
    wanted: dict[str, Quantizer]
    method: PTQMethod
    reached: set[str] = field(default_factory=set)
    importance: Importance = field(default_factory=dict)
    importance_share: float = 0.0
    logits: list[Tensor] = field(default_factory=list)
    progress: Progress = field(default_factory=lambda: Progress("units", 1, shown=False))

    def __post_init__(self) -> None:
        self.recipe: dict[str, Spec] = {name: quantizer.spec for name, quantizer in self.wanted.items()}

    @classmethod
    def of(cls, model: nn.Module, method: PTQMethod) -> Work:
        """The work on all sites that are not calibrated."""
        wanted = {name: q for name, q in quantizers(model) if not q.calibrated}
        return cls(model, wanted, method)

    def is_open(self, names: Iterable[str]) -> bool:
        """Whether all of these sites, but for those in floating point, are still to be calibrated."""
        return all(name in self.wanted or not isinstance(self.model.get_submodule(name), Quantizer) for name in names)

    def width(self, name: str) -> int:
        """The bits of a site that is to be calibrated; 0 for another."""
        return self.wanted[name].spec.width if name in self.wanted else 0

    @property
    def report(self) -> dict[str, Any]:
        """What the method tells after its call."""
        return self.method.report


def drawn(x: Tensor, count: int, axis: int = 0, first: int = 0) -> Tensor:
    """At most ``count`` entries along an axis: the ``first`` ones, others at random, the same for one length."""
    size = x.shape[axis]
    if size <= count:
        return x
    others = first + torch.randperm(size - first, generator=torch.Generator().manual_seed(0))[: count - first]
    picks = torch.cat([torch.arange(first), others.sort().values])
    return x.index_select(axis, picks.to(x.device))


def with_ends(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` values of each group (G, n), with the smallest and the largest of all."""
    if rows.shape[1] <= count:
        return rows.clone()
    ends = torch.stack(rows.aminmax(dim=1), dim=1)
    return torch.cat([drawn(rows, max(1, count - 2), axis=1), ends], dim=1)
