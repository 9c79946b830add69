"""First parameters: the least squared error of every tensor, among many ranges.

Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qat.ptq.fpcs import best_parameters, space_of
from qat.ptq.search import errors
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.quantizers import Quantizer
from qat.ranges import Range, check_fields

LEAST, TOGETHER = 512, 8192  # values of a group, and of all groups, on which errors are compared


@dataclass
class TensorSearch(Step):
    """Weights, and activations as the units before have quantized them, get the range of the least squared error.

    Args:
        samples: values of each tensor that are drawn, of all its groups together.
        levels: refinements of the grid of ranges that is tried.
    """

    samples: Annotated[int, Range(1, 1_000_000_000)] = 65_536
    levels: Annotated[int, Range(0, 20)] = 1

    stage = Stage.INITIALIZE

    def __post_init__(self) -> None:
        check_fields(self)

    def unit(self, here: UnitWork) -> None:
        """Fill the sites of a unit."""
        for _, weight, quantizer in here.wanted_weights():
            fit(quantizer, quantizer.grouped(weight.detach().float()), self.levels)
        found = here.wanted_activations()
        for name, rows in here.samples(found, self.samples).items():
            fit(found[name], rows, self.levels)


def fit(quantizer: Quantizer, samples: Tensor, levels: int) -> None:
    """Choose parameters by the squared error of samples (G, n), or by `init_from` where there is nothing to try."""
    keeps_start = quantizer.reads_integers or quantizer.replaces_softmax  # it gives something else than its input
    space = None if keeps_start else space_of(quantizer, samples)
    if space is None:
        quantizer.init_from(samples)
        return
    spread = spread_out(samples, max(LEAST, TOGETHER // len(samples)))
    quantizer.set_(best_parameters(space, lambda table: errors(quantizer, spread, table), levels=levels).row)


def spread_out(samples: Tensor, count: int) -> Tensor:
    """At most ``count`` values of each group (G, n): the smallest, the largest, and those of evenly spaced ranks."""
    n = samples.shape[1]
    if n <= count:
        return samples
    ranks = torch.linspace(0, n - 1, count, device=samples.device).round().long()
    return samples.sort(dim=1).values[:, ranks]
