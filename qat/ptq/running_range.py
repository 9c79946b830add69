"""Ranges of activations from a stream of batches, as released FQ-ViT has them (IJCAI 2022, arXiv 2111.13824).

The released code searches (``omse``) and refines (powers of two per channel) on the last batch alone; here a random
draw from every batch is kept for that. Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from qat.ptq import search
from qat.ptq.quantiles import quantiles
from qat.quantizers import Quantizer

Kind = Literal["minmax", "ema", "percentile", "omse"]
MOMENTUM = 0.01  # of the moving average
SHARE = 0.99999  # of the values that is below the upper end of `Percentile`


class Samples:
    """A draw of what a site sees, with replacement: of each batch at most ``columns`` values of every group."""

    def __init__(self, columns: int, generator: torch.Generator) -> None:
        self.columns, self.generator = columns, generator
        self._parts: list[Tensor] = []

    def see(self, rows: Tensor) -> None:
        """Draw from one batch (G, n); the same places in each group."""
        if rows.shape[1] > self.columns:
            picks = torch.randint(rows.shape[1], (self.columns,), generator=self.generator).to(rows.device)
            rows = rows[:, picks]
        self._parts.append(rows.clone())

    def joined(self) -> Tensor:
        """All that is kept, (G, batches * columns) or less."""
        return torch.cat(self._parts, dim=1)


class RunningRange(ABC):
    """Sees the batches of one site, then sets its quantizer.

    Args:
        quantizer: of the site.
        samples: values kept of each batch, all groups together, where the quantizer or the observer needs values.
        seed: of the draw.
    """

    def __init__(self, quantizer: Quantizer, samples: int = 100_000, seed: int = 0) -> None:
        self.quantizer = quantizer
        self.kept = Samples(max(1, samples // quantizer.layout.groups), torch.Generator().manual_seed(seed))
        self.keeps = not quantizer.ranged or quantizer.refines
        self._seen: search.Ranges | None = None

    def see(self, x: Tensor) -> None:
        """Take one batch (G, n)."""
        if self.quantizer.ranged:
            ends = self.ends(x)
            self._seen = ends if self._seen is None else self.combine(self._seen, ends)
        if self.keeps:
            self.kept.see(x)

    def fit_(self) -> None:
        """Set the quantizer; a kind without a range starts from the samples."""
        if self.quantizer.ranged:
            self.quantizer.set_range_(*self.range())
            if self.quantizer.refines:
                self.quantizer.refine_(self.kept.joined())
        else:
            self.quantizer.init_from(self.kept.joined())

    def range(self) -> search.Ranges:
        """Low and high (G,) of what was seen."""
        assert self._seen is not None, "see a batch first"
        return self._seen

    def ends(self, x: Tensor) -> search.Ranges:
        """Low and high (G,) of one batch."""
        return x.amin(1), x.amax(1)  # aminmax takes ten times as long

    @abstractmethod
    def combine(self, seen: search.Ranges, new: search.Ranges) -> search.Ranges:
        """The range so far, with that of one more batch."""


class MinMax(RunningRange):
    """The smallest and the largest value of all batches."""

    def combine(self, seen: search.Ranges, new: search.Ranges) -> search.Ranges:
        """The smaller and the larger end."""
        return torch.minimum(seen[0], new[0]), torch.maximum(seen[1], new[1])


class EMA(RunningRange):
    """A moving average of the ends: the first batch sets them, each other one moves them by `MOMENTUM`."""

    def combine(self, seen: search.Ranges, new: search.Ranges) -> search.Ranges:
        """v + MOMENTUM * (new - v)."""
        return torch.lerp(seen[0], new[0], MOMENTUM), torch.lerp(seen[1], new[1], MOMENTUM)


class Percentile(EMA):
    """The same average of two quantiles of each batch, ``share`` and 1 - ``share``."""

    def __init__(self, quantizer: Quantizer, samples: int = 100_000, seed: int = 0, share: float = SHARE) -> None:
        super().__init__(quantizer, samples, seed)
        self.share = share

    def ends(self, x: Tensor) -> search.Ranges:
        """The quantiles."""
        low, high = quantiles(x, (1 - self.share, self.share))
        return low, high


class OMSE(MinMax):
    """Both ends of the min-max range times the one of 90 factors, 1.00 to 0.11, with the least squared error."""

    def __init__(self, quantizer: Quantizer, samples: int = 100_000, seed: int = 0) -> None:
        super().__init__(quantizer, samples, seed)
        self.keeps = True

    def range(self) -> search.Ranges:
        """The best of the shrunk ranges, on the kept samples."""
        candidates = search.shrunk(*super().range(), search.OMSE)
        return search.best_range(self.quantizer, self.kept.joined(), *candidates)


KINDS: dict[Kind, type[RunningRange]] = {"minmax": MinMax, "ema": EMA, "percentile": Percentile, "omse": OMSE}


def running_range_for(quantizer: Quantizer, kind: Kind, samples: int, seed: int) -> RunningRange:
    """A running range of that kind; a quantizer that refines itself gets the range of all values, as in its paper."""
    return (MinMax if quantizer.refines else KINDS[kind])(quantizer, samples, seed)
