"""The arithmetic of a uniform grid, eager or compiled: values, and gradients from what was kept for backward.

Everything works on any shape; ``step``, ``offset`` broadcast over ``x``. Computed in float32 or better: bfloat16 would
change 8-bit codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.errors import QatError, first_line

Bound = Any  # int, or a tensor that broadcasts over x: clamp takes both, its stubs take no union
Values = Callable[[Tensor, Tensor, Tensor | None, Bound, Bound], Tensor]
Gradients = Callable[[Tensor, Tensor, Tensor | None, Tensor, Bound, Bound], tuple[Tensor, Tensor, Tensor | None]]


def scaled(x: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """A new tensor (x - offset) / step, dense in the order of its shape: a product would copy it otherwise."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling():  # the compiler fuses the copy, and loses the layout of an `out`
        x = x.contiguous()
        return x / step if offset is None else (x - offset) / step
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.div(x, step, out=out) if offset is None else torch.sub(x, offset, out=out).div_(step)


def values(x: Tensor, step: Tensor, offset: Tensor | None, qmin: Bound, qmax: Bound) -> Tensor:
    """The nearest values on the grid, in the dtype of ``x``."""
    out = scaled(x, step, offset).clamp_(qmin, qmax).round_().mul_(step)
    return (out if offset is None else out.add_(offset)).to(x.dtype)


def gradients(
    x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, qmin: Bound, qmax: Bound
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
    """Both functions through `torch.compile`: one pass over memory in place of four or more.

    Sizes stay open, and what a tensor is besides its values (a parameter, a view, one with a gradient) is hidden from
    the compiler, so a model of any depth needs a handful of compilations. QatError where there is no compiler.
    """
    limit = torch._dynamo.config.recompile_limit  # ranks, offsets, dtypes and gradient modes are 14 variants and more
    torch._dynamo.config.recompile_limit = max(limit, 64)
    fast_values = torch.compile(values, dynamic=True, fullgraph=True)
    fast_gradients = torch.compile(gradients, dynamic=True, fullgraph=True)

    def fused_values(x: Tensor, step: Tensor, offset: Tensor | None, qmin: Bound, qmax: Bound) -> Tensor:
        return fast_values(*_plain(x, step, offset), qmin, qmax).view(x.shape)

    def fused_gradients(
        x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, qmin: Bound, qmax: Bound
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if x.is_contiguous():
            grad = grad.contiguous()
        plain = _plain(x, step, offset)
        d_x, d_step, d_offset = fast_gradients(*plain, grad.view(plain[0].shape).data, qmin, qmax)
        if offset is not None and d_offset is not None:
            d_offset = d_offset.view(offset.shape)
        return d_x.view(x.shape), d_step.view(step.shape), d_offset

    try:
        fused_values(torch.ones(64), torch.ones(1), None, -8, 7)
    except Exception as error:  # no C++ compiler, no Triton, an unknown platform: torch has no common base for them
        raise QatError(
            f"model.compile: torch.compile does not work here ({first_line(error)}); leave the option out"
        ) from None
    return Kernels(fused_values, fused_gradients)


def _plain(x: Tensor, step: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In one dimension where one step and dense memory allow it; ``data``, because it is no view of anything."""
    if step.numel() > 1 or not x.is_contiguous():
        return x.data, step.data, None if offset is None else offset.data
    return x.view(-1).data, step.view(1).data, None if offset is None else offset.view(1).data
