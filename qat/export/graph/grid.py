"""What an affine site computes, in the terms of ONNX. Shapes: G groups that share a scale.

    n = clip(round((x - offset) / scale), low, high),   value = n * scale + offset

Rounding is half to even, as QuantizeLinear has it. The integers n are stored as n + zero in a container of 8 or 16
bits, unsigned for activations, because runtimes find their integer kernels there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantizers import Quantizer
from qat.quantizers.layout import Layout


class Grid(NamedTuple):
    """The grid of a site.

    Args:
        scale: (G,).
        low, high: the ends of n (G,), whole numbers.
        offset: (G,); None for zero.
        layout: how the tensor is cut into groups.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    offset: Tensor | None
    layout: Layout

    @property
    def is_one(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.scale.numel() == 1

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest n of all groups."""
        return int(self.low.min()), int(self.high.max())

    def integers(self, x: Tensor) -> Tensor:
        """The integers n of a tensor, in its own precision."""
        shift = x if self.offset is None else x - self.layout.view(self.offset, x)
        bounds = (self.layout.view(bound, x) for bound in (self.low, self.high))
        return (shift / self.layout.view(self.scale, x)).clamp(*bounds).round()


@torch.no_grad()
def grid_of(quantizer: Quantizer) -> Grid | None:
    """The grid of a calibrated quantizer; None where its values are on none."""
    affine = quantizer.affine()
    if affine is not None:
        low, high = (end.detach().clone() for end in (affine.qmin - affine.zero_point, affine.qmax - affine.zero_point))
        return Grid(affine.scale.detach().clone(), low, high, None, quantizer.layout)
    offset = getattr(quantizer, "offset", None)
    if not quantizer.even_grid or not isinstance(offset, Tensor):
        return None
    low, high = (torch.full_like(quantizer.step, end) for end in (quantizer.spec.qmin, quantizer.spec.qmax))
    return Grid(quantizer.step.detach().clone(), low, high, offset.detach().clone(), quantizer.layout)


class Container(NamedTuple):
    """How integers n are stored: as n + zero, in an unsigned type.

    Args:
        kind: of the stored integers.
        zero: the zero point.
        ends: the smallest and the largest n that the type holds.
    """

    kind: torch.dtype
    zero: int
    ends: tuple[int, int]


def container_of(low: int, high: int) -> Container | None:
    """The smallest container for integers from low to high; None where a zero point would lie outside of it."""
    for bits, kind in ((8, torch.uint8), (16, torch.uint16)):
        most = 2**bits - 1
        for zero in (0, 2 ** (bits - 1), -low):
            if low + zero >= 0 and high + zero <= most and 0 <= zero <= most:
                return Container(kind, zero, (-zero, most - zero))
    return None
