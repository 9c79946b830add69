"""Candidates of parameters that no range gives: the best of a few, and a search of all. Shapes as in `space`.

G groups that share parameters, n values in a group, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.quantizer import Quantizer
from qat.quantizers.space import Space, Table

FIT_VALUES = 2**18  # samples that choose parameters, of all groups together
AT_ONCE = 8  # candidates


class TableSpace(Space):
    """Points that are rows of parameters; there are no finer ones."""

    def parameters(self, points: Table) -> Table:
        """The points."""
        return points


def thinned(samples: Tensor) -> Tensor:
    """Samples (G, n), or random ones, `FIT_VALUES` of all groups together; the same positions in every group."""
    count, size = max(1, FIT_VALUES // len(samples)), samples.shape[1]
    if size <= count:
        return samples
    chosen = torch.randint(size, (count,), generator=torch.Generator().manual_seed(0))  # even steps would skip channels
    return samples[:, chosen.to(samples.device)]


def least_error(quantizer: Quantizer, table: Table, samples: Tensor) -> Table:
    """The rows (G,) of a table (K, G) with the least squared error on samples (G, n); the first of equal ones."""
    x, errors = thinned(samples), []
    for start in range(0, len(next(iter(table.values()))), AT_ONCE):
        part = {name: values[start : start + AT_ONCE] for name, values in table.items()}
        count = len(next(iter(part.values())))
        found = quantizer.tried(part)(x.repeat(count, 1)).view(count, *x.shape)
        errors.append((found - x).square_().mean(2))
    best = torch.cat(errors).argmin(0)[None]  # (1, G)
    return {name: values.gather(0, best)[0] for name, values in table.items()}
