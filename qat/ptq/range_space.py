"""Ranges that a search tries. Shapes: K points, k kept points, G groups that share a step, n values in a group."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.ptq.search import Ranges, percentiles
from qat.quantizers import Quantizer
from qat.quantizers.quantizer import MIN_RANGE
from qat.quantizers.space import Space, Table
from qat.quantizers.spec import Spec

CANDIDATES = 128  # points of the first grid
SHIFTS = 16  # the most points of one width
INNER = 0.9  # the narrowest range lies between the quantiles 1 - INNER and INNER
NARROWEST = 2**-6  # the narrowest range, at the least, as a part of the full one
SPAWNED = 8  # finer points around one that is kept, as in AdaLog (ECCV 2024, arXiv 2407.12951)
SHRINK = 7.5  # how much closer they lie from one refinement to the next


class RangeSpace(Space):
    """Ranges of a quantizer whose parameters follow from a range; finer ones are scaled about zero.

    Args:
        quantizer: `ranged`, and it does not refine.
        low, high: the ends of every range of the grid (K, G).
        spacing: the logarithm of the ratio of two neighbouring widths of the grid (K, G).
    """

    def __init__(self, quantizer: Quantizer, low: Tensor, high: Tensor, spacing: Tensor) -> None:
        super().__init__({"low": low, "high": high, "spacing": spacing})
        self.quantizer = quantizer

    def near(self, kept: Table) -> Table:
        """Ranges that are wider and narrower by up to half of the spacing, on both sides."""
        between = torch.linspace(-0.5, 0.5, SPAWNED, device=kept["low"].device)[:, None, None]
        factor = (kept["spacing"] * between).exp()  # (SPAWNED, k, G)
        spacing = (kept["spacing"] / SHRINK).expand_as(factor)
        finer = {"low": kept["low"] * factor, "high": kept["high"] * factor, "spacing": spacing}
        return {name: values.flatten(0, 1) for name, values in finer.items()}

    def parameters(self, points: Table) -> Table:
        """Steps and zero points of the ranges."""
        return self.quantizer.from_range(points["low"], points["high"])


def candidate_ranges(spec: Spec, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Low and high (K, G) from samples (G, n), and the logarithm of the ratio of neighbouring widths (K, G).

    The widths form a geometric series, because tensors with long tails would have all points of an even one in their
    tail: down to the range between the quantiles 1 - `INNER` and `INNER` where the zero point can move, and each is
    then shifted by whole steps; otherwise down to `NARROWEST` of the full range.
    """
    low, high = samples.amin(1), samples.amax(1)
    if not spec.movable:
        ratio = torch.logspace(0, 1, CANDIDATES, base=NARROWEST, device=low.device)[:, None]
        step = torch.full_like(ratio * low, (ratio[0] / ratio[1]).log().item())
        return ratio * low, ratio * high, step
    (low, high), spacing = _between((low, high), percentiles(samples, (INNER,)), spec)
    shifts = _shifts(spec)
    shift = torch.arange(shifts, device=low.device) - shifts // 2
    moved = (high - low)[:, None] / (2**spec.width - 1) * shift[:, None]  # (widths, shifts, G)
    spacing = spacing.expand(len(low), shifts, -1).flatten(0, 1)
    return (low[:, None] + moved).flatten(0, 1), (high[:, None] + moved).flatten(0, 1), spacing


def _shifts(spec: Spec) -> int:
    return min(SHIFTS, int(2**spec.width))


def _between(full: Ranges, inner: Ranges, spec: Spec) -> tuple[Ranges, Tensor]:
    """Ranges (widths, G) between an inner (1, G) and a full one (G,), with widths in a geometric series."""
    count = CANDIDATES // _shifts(spec)
    width = (full[1] - full[0]).clamp(min=MIN_RANGE)
    share = ((inner[1][0] - inner[0][0]) / width).clamp(NARROWEST, 1 - 2**-6)  # of the full width
    series = share ** torch.linspace(1, 0, count, device=width.device)[:, None]
    weight = (series - share) / (1 - share)
    ends = torch.lerp(inner[0], full[0], weight), torch.lerp(inner[1], full[1], weight)
    return ends, -share.log()[None, None] / (count - 1)
