"""The arithmetic of a uniform grid, eager or compiled: values, and gradients from what was kept for backward.

Everything works on any shape; ``step``, ``offset`` broadcast over ``x``. Computed in float32 or better: bfloat16 would
change 8-bit codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Values = Callable[[Tensor, Tensor, Tensor | None, int, int], Tensor]
Gradients = Callable[[Tensor, Tensor, Tensor | None, Tensor, int, int], tuple[Tensor, Tensor, Tensor | None]]


def scaled(x: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """A new tensor (x - offset) / step, dense in the order of its shape: a product would copy it otherwise."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.div(x, step, out=out) if offset is None else torch.sub(x, offset, out=out).div_(step)


def values(x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """The nearest values on the grid, in the dtype of ``x``."""
    out = scaled(x, step, offset).clamp_(qmin, qmax).round_().mul_(step)
    return (out if offset is None else out.add_(offset)).to(x.dtype)


def gradients(
    x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``x``, of ``step`` (without its gain) and of ``offset``, from that of the values."""
    v = scaled(x, step, offset)
    clipped = v.clamp(qmin, qmax)
    inside = v.eq_(clipped)  # 1.0 or 0.0 in place: a bool mask costs two more passes
    grad = grad.to(v.dtype)
    d = clipped.round().addcmul_(clipped, inside, value=-1)  # not v: inf * 0 is NaN
    d_step = d.mul_(grad).sum_to_size(step.shape)
    d_x = inside.mul_(grad)
    d_offset = None if offset is None else (grad - d_x).sum_to_size(offset.shape)
    return d_x.to(x.dtype), d_step, d_offset


class Kernels(NamedTuple):
    """Both functions."""

    values: Values
    gradients: Gradients


EAGER = Kernels(values, gradients)


@cache
def compiled() -> Kernels:
    """Both functions through `torch.compile`: one pass over memory in place of four, sizes left open."""
    return Kernels(
        torch.compile(values, dynamic=True, fullgraph=True), torch.compile(gradients, dynamic=True, fullgraph=True)
    )
