"""Searches for the range of a quantizer with the least error on its own tensor.

Candidates and groups are tried together, as K * G groups of one trial quantizer, and in blocks that stay in the cache.
Shapes: K candidates, G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat.ptq.quantiles import quantiles
from qat.quantizers import Quantizer
from qat.quantizers.space import Table

Ranges = tuple[Tensor, Tensor]  # low and high, both (K, G) or both (G,)
Propose = Callable[[Tensor], Ranges]  # samples (G, n) -> low and high of K candidates (K, G)

PERCENTILES = (0.999, 0.9999, 0.99999)  # of RepQ-ViT, in its order
OMSE_FACTORS = tuple(1 - 0.01 * i for i in range(90))  # of released FQ-ViT: 1.00 to 0.11
BRECQ_FACTORS = tuple(1 - 0.01 * i for i in range(80))  # of BRECQ: 1.00 to 0.21, with the error to the power 2.4
BLOCK = {"cpu": 2**20}  # values computed at once, by type of device; they must stay in the cache
OTHER_BLOCK = 2**24  # values computed at once on accelerators: enough work for one kernel
COLUMNS = 1024  # the least number of columns of a block; shorter rows are slow


def extremes(samples: Tensor) -> Ranges:
    """One candidate: from the smallest to the largest value of each group."""
    return samples.amin(1)[None], samples.amax(1)[None]


def percentiles(samples: Tensor, shares: Sequence[float] = PERCENTILES) -> Ranges:
    """A candidate for each share: from the quantile 1 - share to the quantile share."""
    ends = quantiles(samples, [*(1 - share for share in shares), *shares])
    return ends[: len(shares)], ends[len(shares) :]


def shrunk(low: Tensor, high: Tensor, factors: Sequence[float]) -> Ranges:
    """A candidate for each factor: both ends (G,) times the factor."""
    column = torch.tensor(factors, dtype=low.dtype, device=low.device)[:, None]
    return low * column, high * column


@torch.no_grad()
def errors(quantizer: Quantizer, samples: Tensor, table: Table, power: float = 2.0) -> Tensor:
    """The mean of |x - q(x)|**power over each group, (K, G), for each row of a table of parameters.

    Args:
        quantizer: maps each value independently of the others; it is not changed.
        samples: the values (G, n).
        table: candidates (K, G) for its parameters, by name.
        power: 2 is the squared error.
    """
    groups, n = samples.shape
    candidates = len(next(iter(table.values())))
    block = BLOCK.get(samples.device.type, OTHER_BLOCK)
    columns = min(n, max(block // (candidates * groups), COLUMNS))
    together = max(1, block // (groups * columns))  # candidates
    parts = ({name: values[k : k + together] for name, values in table.items()} for k in range(0, candidates, together))
    return torch.cat([_errors(quantizer.tried(part), samples, power, columns) for part in parts])


def _errors(trial: Quantizer, samples: Tensor, power: float, columns: int) -> Tensor:
    groups = len(samples)
    candidates = trial.layout.groups // groups
    total = torch.zeros(candidates * groups, dtype=torch.float64, device=samples.device)
    for part in samples.split(columns, dim=1):
        x = part.expand(candidates, -1, -1).reshape(candidates * groups, -1)  # no copy where there is a single group
        total += (trial(x) - x).abs_().pow_(power).sum(1)
    return total.view(candidates, groups) / samples.shape[1]


def range_errors(quantizer: Quantizer, samples: Tensor, low: Tensor, high: Tensor, power: float = 2.0) -> Tensor:
    """The errors (K, G) of the ranges low..high (K, G), by `Spec.search_grid` of the quantizer."""
    grid: Quantizer = quantizer.spec.search_grid.build(quantizer.layout).to(samples.device)
    return errors(grid, samples, grid.from_range(low, high), power)


def best_range(quantizer: Quantizer, samples: Tensor, low: Tensor, high: Tensor, power: float = 2.0) -> Ranges:
    """The first of the candidates (K, G) with the least error, for each group: low and high (G,)."""
    if len(low) == 1:
        return low[0], high[0]
    found = range_errors(quantizer, samples, low, high, power).nan_to_num(nan=torch.inf)
    best = found.argmin(0, keepdim=True)
    return low.gather(0, best)[0], high.gather(0, best)[0]


@torch.no_grad()
def calibrate_(quantizer: Quantizer, samples: Tensor, propose: Propose = extremes, power: float = 2.0) -> None:
    """Choose the parameters from samples (G, n): by the best of the proposed ranges, if the quantizer has a range."""
    if not quantizer.ranged:
        quantizer.init_from(samples)
        return
    propose = extremes if quantizer.refines else propose
    quantizer.set_range_(*best_range(quantizer, samples, *propose(samples), power))
    quantizer.refine_(samples)


def calibrate_by_percentiles_(quantizer: Quantizer, samples: Tensor, shares: Sequence[float] = PERCENTILES) -> None:
    """Choose the parameters from samples (G, n): by the percentile range with the least squared error (RepQ-ViT)."""
    calibrate_(quantizer, samples, lambda values: percentiles(values, shares))
