"""Search from coarse to fine, as FPCS of AdaLog (ECCV 2024, arXiv 2407.12951): keep the best points, try finer ones.

Groups that share a step search side by side, each for itself; where their errors cannot be told apart they go together.
Shapes: K points, k kept points, G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qat.ptq.range_space import RangeSpace, candidate_ranges
from qat.quantizers import Quantizer
from qat.quantizers.space import Space, Table

KEPT = 16  # points that are kept from one refinement to the next
LAST = 8  # of them are compared by all rows, where the others were compared by a part
PARENTS = 4  # of them get finer points around them; AdaLog refines all of them, for four times the work
LEVELS = 5  # refinements

Errors = Callable[[Table], Tensor]  # parameters (K, G) by name -> errors (K, G), or (K, 1) of all groups together


def space_of(quantizer: Quantizer, samples: Tensor) -> Space | None:
    """What a search tries for a quantizer, from samples (G, n); None where there is nothing to try."""
    own = quantizer.search_space(samples)
    if own is not None or not quantizer.ranged or quantizer.refines:
        return own
    return RangeSpace(quantizer, *candidate_ranges(quantizer.spec, samples))


class Found(NamedTuple):
    """What a search ends with.

    Args:
        row: the parameters (G,) with the least error, by name.
        least: that error (G,), or (1,) where groups go together.
        points: the best points (k, G), from which another search can start.
    """

    row: Table
    least: Tensor
    points: Table


@torch.no_grad()
def best_parameters(
    space: Space, errors: Errors, quick: Errors | None = None, levels: int = LEVELS, start: Table | None = None
) -> Found:
    """Find the parameters with the least error.

    Args:
        space: what is tried.
        errors: decide between the last points.
        quick: decide before that; None for the same.
        levels: refinements.
        start: points of an earlier search in place of the grid.
    """
    quick = quick or errors
    points = start or space.first
    points, found = _least(points, quick(space.parameters(points)), KEPT)
    for _ in range(levels):
        finer = space.near({name: values[:PARENTS] for name, values in points.items()})
        if finer is None:
            break
        more = quick(space.parameters(finer))
        points = {name: torch.cat([values, finer[name]]) for name, values in points.items()}
        points, found = _least(points, torch.cat([found, more]), KEPT)
    if quick is not errors:
        points = {name: values[:LAST] for name, values in points.items()}
        points, found = _least(points, errors(space.parameters(points)), LAST)
    return Found({name: rows[0] for name, rows in space.parameters(points).items()}, found[0], points)


def _least(points: Table, errors: Tensor, count: int) -> tuple[Table, Tensor]:
    """The points with the least errors, for each group, best first."""
    found, best = errors.nan_to_num(nan=torch.inf).topk(min(count, len(errors)), dim=0, largest=False)
    return {name: rows.gather(0, best.expand(-1, rows.shape[1])) for name, rows in points.items()}, found
