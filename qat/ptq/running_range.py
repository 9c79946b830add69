"""Ranges of activations from a stream of batches: the observers of released FQ-ViT (IJCAI 2022, arXiv 2111.13824).

The released code searches (``omse``) and refines (powers of two per channel) on the last batch alone; here both use a
random draw from every batch. Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from qat.ptq import search
from qat.ptq.quantiles import quantiles
from qat.quantizers import Quantizer

Observer = Literal["minmax", "ema", "percentile", "omse"]  # names of running ranges, as in FQ-ViT
MOMENTUM = 0.01  # weight of a new batch in the moving average
SHARE = 0.99999  # quantile at the upper end of `Percentile`


class Samples:
    """Values drawn from what a site receives, with replacement: at most ``columns`` of each group and batch."""

    def __init__(self, columns: int, generator: torch.Generator) -> None:
        self.columns, self.generator = columns, generator
        self._parts: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Draw from one batch (G, n), at the same places in each group."""
        if rows.shape[1] > self.columns:
            picks = torch.randint(rows.shape[1], (self.columns,), generator=self.generator).to(rows.device)
            rows = rows[:, picks]
        self._parts.append(rows.clone())

    def joined(self) -> Tensor:
        """Everything that was kept: (G, at most batches * columns)."""
        return torch.cat(self._parts, dim=1)


class RunningRange(ABC):
    """Follows the range of one site from batch to batch, then calibrates its quantizer.

    Args:
        quantizer: what is calibrated.
        samples: values kept of each batch, of all groups together, where the quantizer or the range needs values.
        seed: seeds the draw of these values.
    """

    def __init__(self, quantizer: Quantizer, samples: int = 100_000, seed: int = 0) -> None:
        self.quantizer = quantizer
        self.kept = Samples(max(1, samples // quantizer.layout.groups), torch.Generator().manual_seed(seed))
        self.keeps = not quantizer.ranged or quantizer.refines
        self._range: search.Ranges | None = None

    def update(self, x: Tensor) -> None:
        """Take in one batch (G, n)."""
        if self.quantizer.ranged:
            ends = self.ends(x)
            self._range = ends if self._range is None else self.combine(self._range, ends)
        if self.keeps:
            self.kept.update(x)

    def calibrate_(self) -> None:
        """Choose the parameters of the quantizer; one without a range starts from the samples."""
        if self.quantizer.ranged:
            self.quantizer.set_range_(*self.range())
            if self.quantizer.refines:
                self.quantizer.refine_(self.kept.joined())
        else:
            self.quantizer.init_from(self.kept.joined())

    def range(self) -> search.Ranges:
        """Low and high (G,) over all batches so far."""
        assert self._range is not None, "update with a batch first"
        return self._range

    def ends(self, x: Tensor) -> search.Ranges:
        """Low and high (G,) of one batch."""
        return x.amin(1), x.amax(1)  # aminmax takes ten times as long

    @abstractmethod
    def combine(self, old: search.Ranges, new: search.Ranges) -> search.Ranges:
        """The range of earlier batches, updated by the range of one more."""


class MinMax(RunningRange):
    """The smallest and the largest value of all batches."""

    def combine(self, old: search.Ranges, new: search.Ranges) -> search.Ranges:
        """Widen the range to contain both."""
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])


class EMA(RunningRange):
    """A moving average of the ends: the first batch sets them, each other one moves them by `MOMENTUM`."""

    def combine(self, old: search.Ranges, new: search.Ranges) -> search.Ranges:
        """old + MOMENTUM * (new - old)."""
        return torch.lerp(old[0], new[0], MOMENTUM), torch.lerp(old[1], new[1], MOMENTUM)


class Percentile(EMA):
    """The moving average of `EMA`, of the quantiles 1 - ``share`` and ``share`` of each batch."""

    def __init__(self, quantizer: Quantizer, samples: int = 100_000, seed: int = 0, share: float = SHARE) -> None:
        super().__init__(quantizer, samples, seed)
        self.share = share

    def ends(self, x: Tensor) -> search.Ranges:
        """Both quantiles (G,) of one batch."""
        low, high = quantiles(x, (1 - self.share, self.share))
        return low, high


class OMSE(MinMax):
    """The min-max range, shrunk by the one of 90 factors, 1.00 to 0.11, that has the least squared error."""

    def __init__(self, quantizer: Quantizer, samples: int = 100_000, seed: int = 0) -> None:
        super().__init__(quantizer, samples, seed)
        self.keeps = True

    def range(self) -> search.Ranges:
        """The shrunk range (G,) with the least squared error on the kept samples."""
        candidates = search.shrunk(*super().range(), search.OMSE_FACTORS)
        return search.best_range(self.quantizer, self.kept.joined(), *candidates)


OBSERVERS: dict[Observer, type[RunningRange]] = {"minmax": MinMax, "ema": EMA, "percentile": Percentile, "omse": OMSE}


def running_range_for(quantizer: Quantizer, observer: Observer, samples: int, seed: int) -> RunningRange:
    """The running range that an observer names; a quantizer that refines its range gets `MinMax`, as in FQ-ViT."""
    return (MinMax if quantizer.refines else OBSERVERS[observer])(quantizer, samples, seed)
