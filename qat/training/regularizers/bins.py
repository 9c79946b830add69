"""Oscillation-aware bin regularization (VVTQ: Huang et al., arXiv 2307.00331).

With v = clip((w - offset) / step, qmin, qmax), code k = round(v), r = step * (v - k), a weight costs

    R = sum_i r_i^2 [/ number of weights]   +   sum over bins j of Var{ r_i : k_i = j }

The first term pulls to the centre of a bin, the second to the mean of its members. Var is unbiased and is left out for
a bin of one; r may stand for the clipped weight in it because a bin has one centre. The quantized value is a constant.
Gradients, with n_j members and the mean m_j of r in bin j:

    dR/dw_i = 2 r_i [/ number of weights] + 2 (r_i - m_j) / (n_j - 1)   inside the range, 0 outside
    dR/dstep = gain * sum over the weights outside of bound * 2 (r_i - m_j) / (n_j - 1)
    dR/doffset = the same sum without gain and bound

Weights of one width are laid out in rows and go through the same few operations together, on a GPU all of them, which
saves launches, on a CPU as many as fit into its cache.

Shapes: G groups that share a step, R rows of m weights, each row from one group, L levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.ranges import checked
from qat.sites.insert import WeightSite
from qat.training.regularizers.base import LOW_BITS, PenaltyWeight, Regularizer, Start, Widest, grid_of

Reduction = Literal["sum", "mean"]
ROW = 1024  # weights in a row at most: threads, and atomic additions, do not meet in the same few bins
CACHED = 2**18  # weights that go through all operations together on a CPU: 1 MB in float32


class BinRegularizer(Regularizer):
    """Distance from the bin centre plus the variance within each bin.

    Args:
        weight: weight of this loss when training ends; the released VVTQ code has 0.01.
        start: share of training, 0 to 1, before the weight rises from zero; nothing is computed until then.
        reduction: of the squared distances: their sum over a weight (as in the paper), or their mean (as released),
            which is some 2,000 times weaker on DeiT-Tiny.
        sites: glob over the names of weight sites.
        max_bits: widest weight that is regularized.
    """

    @checked
    def __init__(
        self,
        weight: PenaltyWeight = 0.01,
        start: Start = 0.25,
        reduction: Reduction = "sum",
        sites: str = "*.weight_quant",
        max_bits: Widest = LOW_BITS,
    ) -> None:
        super().__init__(weight, start, sites, max_bits)
        self.reduction = reduction

    def penalty(self, sites: Sequence[WeightSite]) -> Tensor:
        """R of these weights; every group has bins of its own."""
        parts = []
        for bounds, group in groupby(sorted(sites, key=_bounds), _bounds):
            same = list(group)
            m = gcd(ROW, *(site.weight.numel() // site.quantizer.layout.groups for site in same))
            parts += [self._together(portion, bounds, m) for portion in _portions(same)]
        return torch.stack(parts).sum()

    def _together(self, sites: list[WeightSite], bounds: tuple[int, int], m: int) -> Tensor:
        grids = [grid_of(site) for site in sites]
        weights = [grid.grouped(site.weight) for grid, site in zip(grids, sites, strict=True)]  # (G_i, n_i)
        shapes = tuple((weight.shape[0], weight.shape[1]) for weight in weights)
        group, size = _rows(shapes, m, weights[0].device)
        x = torch.cat([weight.reshape(-1, m) for weight in weights])  # (R, m)
        step, offset = torch.cat([grid.step for grid in grids]), None
        if any(grid.offset is not None for grid in grids):
            offset = torch.cat([torch.zeros_like(g.step) if g.offset is None else g.offset for g in grids])
        gain = torch.cat([_gain(site) for site in sites])
        scale = None if self.reduction == "sum" else 1 / size.to(step.dtype)
        out: Tensor = BinPenalty.apply(x, step, offset, group, gain, scale, bounds)
        return out


def _portions(sites: Iterable[WeightSite]) -> Iterator[list[WeightSite]]:
    """The sites in order; on a CPU in lists of at most `CACHED` weights, or of one site."""
    portion: list[WeightSite] = []
    count = 0
    for site in sites:
        if portion and site.weight.device.type == "cpu" and count + site.weight.numel() > CACHED:
            yield portion
            portion, count = [], 0
        portion.append(site)
        count += site.weight.numel()
    yield portion


@cache
def _rows(shapes: tuple[tuple[int, int], ...], m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For weights (G_i, n_i) in rows of m: the group of each row (R,), and the numel of the weight of each group (G,).

    Kept, because a copy to a GPU makes the host wait.
    """
    rows = torch.tensor([n // m for groups, n in shapes for _ in range(groups)], device=device)
    size = torch.tensor([groups * n for groups, n in shapes for _ in range(groups)], device=device)
    return torch.arange(len(rows), device=device).repeat_interleave(rows), size


def _bounds(site: WeightSite) -> tuple[int, int]:
    grid = grid_of(site)
    return grid.qmin, grid.qmax


def _gain(site: WeightSite) -> Tensor:
    """The factor on the gradient of each step (G,)."""
    grid = grid_of(site)
    gain = grid.gain(site.weight) if grid.step.requires_grad else 1.0
    if isinstance(gain, Tensor) and gain.numel() > 1:
        return grid.grouped(gain.expand_as(site.weight))[:, 0]
    return torch.zeros_like(grid.step.detach()) + gain


class BinPenalty(torch.autograd.Function):
    """R; its gradients are computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, group: Tensor, gain: Tensor, scale: Tensor | None,
        bounds: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        """R of the weights ``x`` (R, m); ``group`` (R,) is the index of a row's step, offset, gain and scale (G,)."""
        s = step[group][:, None]  # (R, 1)
        v = x / s if offset is None else (x - offset[group][:, None]).div_(s)
        clipped = v.clamp(*bounds)
        codes = clipped.round()
        inside = v.eq_(clipped)  # 1.0 or 0.0 in place
        r = (clipped - codes).mul_(s)
        centred, weight = _within_bins(r, codes.sub_(bounds[0]).long(), group, len(step), bounds[1] - bounds[0] + 1)
        pull = weight.mul_(centred)
        weight_of_r = None if scale is None else scale[group][:, None]  # (R, 1)
        squares = r.square() if weight_of_r is None else r.square().mul_(weight_of_r)
        value = torch.dot(centred.view(-1), pull.view(-1)) + squares.sum()
        outside = torch.addcmul(pull, pull, inside, value=-1)
        pull = pull.add_(r) if weight_of_r is None else pull.addcmul_(r, weight_of_r)
        ctx.d_x = pull.mul_(inside)
        per_group = torch.zeros_like(step)
        ctx.d_offset = None if offset is None else per_group.index_add(0, group, outside.sum(1)).mul_(2)
        ctx.d_step = per_group.index_add(0, group, outside.mul_(clipped).sum(1)).mul_(2).mul_(gain)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the upstream one."""
        (grad,) = grads
        d_offset = None if ctx.d_offset is None else ctx.d_offset * grad
        return ctx.d_x * (2 * grad), ctx.d_step * grad, d_offset, None, None, None, None


def _within_bins(r: Tensor, bins: Tensor, group: Tensor, groups: int, levels: int) -> tuple[Tensor, Tensor]:
    """r minus the mean of its bin, and 1 / (members of its bin - 1), 0 for a bin of one: both (R, m)."""
    empty, per_group = r.new_zeros(len(r), levels), r.new_zeros(groups, levels)
    count = per_group.index_add(0, group, empty.scatter_add(1, bins, torch.ones_like(r)))  # (G, L)
    mean = per_group.index_add(0, group, empty.scatter_add_(1, bins, r)) / count.clamp(min=1)
    weight = torch.where(count > 1, 1 / (count - 1).clamp(min=1), 0)
    centred = mean[group].gather(1, bins)
    return torch.sub(r, centred, out=centred), weight[group].gather(1, bins)
