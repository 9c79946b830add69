"""Oscillation-aware bin regularization (VVTQ, specification section 3).

With v = clip((w - offset) / step, qmin, qmax), code k = round(v), r = step * (v - k), a weight costs

    R = sum_i r_i^2 [/ number of weights]   +   sum over bins j of Var{ r_i : k_i = j }

The first term pulls to the centre of a bin, the second to the mean of its members. Var is unbiased and is left out for
a bin of one; r may stand for the clipped weight in it because a bin has one centre. The quantised value is a constant.
Gradients, with n_j members and the mean m_j of r in bin j:

    dR/dw_i = 2 r_i [/ number of weights] + 2 (r_i - m_j) / (n_j - 1)   inside the range, 0 outside
    dR/dstep = gain * sum over the weights outside of bound * 2 (r_i - m_j) / (n_j - 1)
    dR/doffset = the same sum without gain and bound

Shapes: G groups that share a step, n weights in a group, L levels.
"""

from __future__ import annotations

from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.insert import WeightSite
from qat.regularizers.base import LOW_BITS, Regularizer, grid_of

Reduction = Literal["sum", "mean"]
ROWS = 64  # pieces that a long group is summed in: threads, and atomic additions, do not meet in the same few bins


class BinRegularizer(Regularizer):
    """Distance from the bin centre plus the variance within each bin.

    Args:
        weight: of the loss when training ends; 0.01 is that of the released VVTQ code.
        start: part of training, 0 to 1, during which the weight is zero and nothing is computed.
        reduction: of the distances: sum over the values of a weight (as in the paper), or their mean (as released),
            which is some 2,000 times weaker on DeiT-Tiny.
        sites: glob over the names of weight sites.
        max_bits: widest weight that is regularised.
    """

    def __init__(
        self,
        weight: float = 0.01,
        start: float = 0.25,
        reduction: Reduction = "sum",
        sites: str = "*.weight_quant",
        max_bits: int = LOW_BITS,
    ) -> None:
        super().__init__(weight, start, sites, max_bits)
        self.reduction = reduction

    def penalty(self, site: WeightSite) -> Tensor:
        """R of one weight; every group has bins of its own."""
        weight, quantizer = site.weight, grid_of(site)
        scale = 1.0 if self.reduction == "sum" else 1 / weight.numel()
        gain = quantizer.gain(weight) if quantizer.step.requires_grad else 1.0
        if isinstance(gain, Tensor) and gain.numel() > 1:
            gain = quantizer.grouped(gain.expand_as(weight))[:, 0]  # (G,)
        x, bounds = quantizer.grouped(weight), (quantizer.qmin, quantizer.qmax)
        out: Tensor = BinPenalty.apply(x, quantizer.step, quantizer.offset, gain, bounds, scale)
        return out


class BinPenalty(torch.autograd.Function):
    """R and, in the same pass, its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, gain: float | Tensor, bounds: tuple[int, int],
        scale: float,
    ) -> Tensor:  # fmt: skip
        """R of the weights ``x`` (G, n) with ``step`` and ``offset`` (G,)."""
        v = (x if offset is None else x - offset[:, None]) / step[:, None]
        clipped = v.clamp(*bounds)
        codes = clipped.round()
        inside = v == clipped
        r = (clipped - codes).mul_(step[:, None])
        centred, weight = _within_bins(r, codes.sub_(bounds[0]).long(), bounds[1] - bounds[0] + 1)
        pull = centred * weight  # (G, n)
        ctx.d_x = (pull + r * scale).mul_(2).mul_(inside)
        outside = pull.mul_(~inside).mul_(2)
        ctx.d_step = (outside * clipped).sum(1) * gain
        ctx.d_offset = None if offset is None else outside.sum(1)
        return r.square().sum() * scale + (centred.square_().mul_(weight)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the upstream one."""
        (grad,) = grads
        d_offset = None if ctx.d_offset is None else ctx.d_offset * grad
        return ctx.d_x * grad, ctx.d_step * grad, d_offset, None, None, None


def _within_bins(r: Tensor, bins: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(r - mean of its bin) and 1 / (members of its bin - 1), 0 for a bin of one: both (G, n)."""
    G, n = r.shape
    rows = gcd(n, ROWS) if G < ROWS else 1
    rows_of_bins, rows_of_r = bins.view(G * rows, -1), r.reshape(G * rows, -1)
    empty = r.new_zeros(G * rows, levels)
    count = empty.scatter_add(1, rows_of_bins, torch.ones_like(rows_of_r)).view(G, rows, levels).sum(1)  # (G, L)
    total = empty.scatter_add_(1, rows_of_bins, rows_of_r).view(G, rows, levels).sum(1)
    mean = total / count.clamp(min=1)
    weight = torch.where(count > 1, 1 / (count - 1).clamp(min=1), 0)
    return r - mean.gather(1, bins), weight.gather(1, bins)
