"""Exact quantiles of long rows, with linear interpolation as `numpy.quantile`. G rows, n finite values in a row.

`torch.quantile` refuses more than 2**24 values and sorts all of them. Calibration asks for shares near 0 and 1, so the
few values beyond a threshold are enough: a random sample gives the threshold, one pass finds the values, and a count
proves that none is missing. The sample decides how long this takes, never the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, sqrt

import torch
from torch import Tensor

SHORT = 2**16  # up to here topk is as fast
SAMPLE = 2**16  # values of a long row that place its threshold
TAIL = 16  # a tail is at most 1 / TAIL of a row; between the tails every rank costs a selection


def quantiles(x: Tensor, shares: Sequence[float]) -> Tensor:
    """The values (len(shares), G), float32 or better, below which each share (0 to 1) of a row of ``x`` (G, n) lies."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    places = [share * (x.shape[1] - 1) for share in shares]
    ranks = sorted({end for place in places for end in (floor(place), ceil(place))})
    values = dict(zip(ranks, ranked(x, ranks), strict=True))
    return torch.stack(
        [torch.lerp(values[floor(place)], values[ceil(place)], place - floor(place)) for place in places]
    )


def ranked(x: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The values (G,) at these ascending ranks of each row (G, n); rank 0 is the smallest."""
    n = x.shape[1]
    low = [rank for rank in ranks if rank < n // TAIL]
    high = [rank for rank in ranks if n - rank <= n // TAIL]
    lowest = outermost(x, low[-1] + 1, largest=False) if low else x
    highest = outermost(x, n - high[0], largest=True) if high else x
    middle = [x.kthvalue(rank + 1, dim=1).values for rank in ranks[len(low) : len(ranks) - len(high)]]
    return [*(lowest[:, rank] for rank in low), *middle, *(highest[:, n - 1 - rank] for rank in high)]


def outermost(x: Tensor, k: int, largest: bool) -> Tensor:
    """The k largest, or smallest, values of each row, sorted (G, k), the outermost first."""
    if x.shape[1] <= SHORT:
        return x.topk(k, dim=1, largest=largest).values
    threshold = _threshold(x, k, largest)
    inside = x <= threshold if largest else x >= threshold
    row, column = inside.logical_not_().nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(x))
    if int(counts.min()) < k:  # values that equal the threshold fill the gap, where there are enough of them
        ties = (x == threshold).sum(1)
        if int((counts + ties).min()) < k:
            return x.topk(k, dim=1, largest=largest).values
    beyond = threshold.repeat(1, max(k, int(counts.max())))
    slot = torch.arange(len(row), device=x.device) - (counts.cumsum(0) - counts)[row]
    beyond[row, slot] = x[row, column]
    return beyond.topk(k, dim=1, largest=largest).values


def _threshold(x: Tensor, k: int, largest: bool) -> Tensor:
    """A value (G, 1) beyond which lie more than k values of nearly every row: six standard deviations more."""
    n = x.shape[1]
    size = min(SAMPLE, n // TAIL)
    expected = size * k / n
    picks = torch.randint(n, (size,), generator=torch.Generator().manual_seed(0)).to(x.device)
    return x[:, picks].topk(ceil(expected + 6 * sqrt(expected) + 8), dim=1, largest=largest).values[:, -1:]
