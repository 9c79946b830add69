"""The arithmetic of a uniform grid, eager or compiled: values, and gradients from what was kept for backward.

Everything works on any shape; ``step``, ``offset`` and the bounds broadcast over ``x``. Computed in float32 or better:
bfloat16 would change 8-bit codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.errors import QatError, first_line
from qat.quantizers.blocks import blocks

Bound = Any  # a number, or a tensor that broadcasts over x: clamp takes both, its stubs take no union
Values = Callable[[Tensor, Tensor, Tensor | None, Bound, Bound], Tensor]
Gradients = Callable[[Tensor, Tensor, Tensor | None, Tensor, Bound, Bound], tuple[Tensor, Tensor, Tensor | None]]


def wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in: that of ``x``, but float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def host_reads(device: torch.device) -> bool:
    """The host may look at values of this device: it does not have to wait for them, nor does it compile."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def number(values: Tensor) -> Bound:
    """A single value as a number where the host may read it: a clamp between numbers takes half the time."""
    return float(values) if values.numel() == 1 and host_reads(values.device) else values


def scaled(x: Tensor, step: Tensor, offset: Tensor | None, out: Tensor | None = None) -> Tensor:
    """(x - offset) / step, dense in the order of its shape (a product would copy it otherwise), into ``out`` or new."""
    x = x.to(wide(x))
    if torch.compiler.is_compiling():  # the compiler fuses the copy, and loses the layout of an `out`
        x = x.contiguous()
        return x / step if offset is None else (x - offset) / step
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return torch.div(x, step, out=out) if offset is None else torch.sub(x, offset, out=out).div_(step)


def _values(
    x: Tensor, step: Tensor, offset: Tensor | None, qmin: Bound, qmax: Bound, out: Tensor | None = None
) -> Tensor:
    """The nearest values on the grid, float32 or better."""
    found = scaled(x, step, offset, out).clamp_(qmin, qmax).round_().mul_(step)
    return found if offset is None else found.add_(offset)


def values(x: Tensor, step: Tensor, offset: Tensor | None, qmin: Bound, qmax: Bound) -> Tensor:
    """The nearest values on the grid, in the dtype of ``x``."""
    if torch.compiler.is_compiling():
        return _values(x, step, offset, qmin, qmax).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part, target in blocks((x, out), (step, offset, qmin, qmax)):
        if x.dtype == wide(x):
            _values(part, step, offset, qmin, qmax, target)
        else:
            target.copy_(_values(part, step, offset, qmin, qmax))
    return out


class Slopes(NamedTuple):
    """Gradients value by value, float32 or better: of ``x``, and of the step before it is summed."""

    x: Tensor
    step: Tensor


def _slopes(
    x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, qmin: Bound, qmax: Bound, out: Slopes | None = None
) -> Slopes:
    v = scaled(x, step, offset, None if out is None else out.x)
    clipped = v.clamp(qmin, qmax)
    inside = v.eq_(clipped)  # 1.0 or 0.0 in place: a bool mask costs two more passes
    grad = grad.to(v.dtype)
    rounded = clipped.round() if out is None else torch.round(clipped, out=out.step)
    d = rounded.addcmul_(clipped, inside, value=-1)  # not v: inf * 0 is NaN
    return Slopes(inside.mul_(grad), d.mul_(grad))


def _summed(x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, slopes: Slopes) -> tuple[
    Tensor, Tensor, Tensor | None
]:  # fmt: skip
    d_offset = None if offset is None else (grad.to(slopes.x.dtype) - slopes.x).sum_to_size(offset.shape)
    return slopes.x.to(x.dtype), slopes.step.sum_to_size(step.shape), d_offset


def _gradients(
    x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, qmin: Bound, qmax: Bound
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _summed(x, step, offset, grad, _slopes(x, step, offset, grad, qmin, qmax))


def gradients(
    x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, qmin: Bound, qmax: Bound
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``x``, of ``step`` (without its gain) and of ``offset``, from that of the values."""
    if torch.compiler.is_compiling():
        return _gradients(x, step, offset, grad, qmin, qmax)
    whole = Slopes(*(torch.empty(x.shape, dtype=wide(x), device=x.device) for _ in range(2)))
    for part, grad_part, *out in blocks((x, grad, *whole), (step, offset, qmin, qmax)):
        _slopes(part, step, offset, grad_part, qmin, qmax, Slopes(*out))
    return _summed(x, step, offset, grad, whole)


class Kernels(NamedTuple):
    """Both functions."""

    values: Values
    gradients: Gradients


EAGER = Kernels(values, gradients)


@cache
def compiled(device_type: str) -> Kernels:
    """Both functions through `torch.compile`: one pass over memory in place of four or more.

    Sizes stay open, and what a tensor is besides its values (a parameter, a view, one with a gradient) is hidden from
    the compiler, so a model of any depth needs a handful of compilations.

    Args:
        device_type: the kind of device that a first compilation is tried on, such as ``cpu`` or ``cuda``.

    Raises:
        QatError: there is no compiler for this kind of device.
    """
    limit = torch._dynamo.config.recompile_limit  # ranks, offsets, dtypes and gradient modes are 14 variants and more
    torch._dynamo.config.recompile_limit = max(limit, 64)
    fast_values = torch.compile(values, dynamic=True, fullgraph=True)
    fast_gradients = torch.compile(gradients, dynamic=True, fullgraph=True)

    def fused_values(x: Tensor, step: Tensor, offset: Tensor | None, qmin: Bound, qmax: Bound) -> Tensor:
        return fast_values(*_plain(x, step, offset), *_tensors(x, qmin, qmax)).view(x.shape)

    def fused_gradients(
        x: Tensor, step: Tensor, offset: Tensor | None, grad: Tensor, qmin: Bound, qmax: Bound
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if x.is_contiguous():
            grad = grad.contiguous()
        plain = _plain(x, step, offset)
        d_x, d_step, d_offset = fast_gradients(*plain, grad.view(plain[0].shape).data, *_tensors(x, qmin, qmax))
        if offset is not None and d_offset is not None:
            d_offset = d_offset.view(offset.shape)
        return d_x.view(x.shape), d_step.view(step.shape), d_offset

    try:
        fused_values(torch.ones(64, device=device_type), torch.ones(1, device=device_type), None, -8, 7)
    except Exception as error:  # no C++ compiler, no Triton, an unknown platform: torch has no common base for them
        raise QatError(
            f"model.compile: torch.compile does not work on {device_type} here ({first_line(error)}); "
            "leave the option out"
        ) from None
    return Kernels(fused_values, fused_gradients)


def _plain(x: Tensor, step: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In one dimension where one step and dense memory allow it; ``data``, because it is no view of anything."""
    if step.numel() > 1 or not x.is_contiguous():
        return x.data, step.data, None if offset is None else offset.data
    return x.view(-1).data, step.view(1).data, None if offset is None else offset.view(1).data


def _tensors(x: Tensor, *bounds: Bound) -> list[Bound]:
    """Bounds that are tensors or integers: the compiler would compile again for every other floating-point number."""
    return [torch.full((1,), bound, device=x.device) if isinstance(bound, float) else bound for bound in bounds]
