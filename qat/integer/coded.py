"""A tensor that remembers the whole numbers it consists of, while it is moved and not changed.

Some recipes quantize the output of a layer or a norm, and the product that reads it has no site of its own: between the
two it is only cut, turned, padded with zeros or rolled. Anything else that is computed with it gives a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.quantizers import Spec
from qat.quantizers.terms import Term, whole

MOVES: set[Any] = {
    Tensor.reshape, Tensor.view, Tensor.permute, Tensor.transpose, Tensor.flatten, Tensor.unflatten, Tensor.unbind,
    Tensor.chunk, Tensor.split, Tensor.contiguous, Tensor.expand, Tensor.unsqueeze, Tensor.squeeze, Tensor.__getitem__,
    Tensor.index_select, torch.roll, torch.unbind, torch.chunk, torch.split, torch.index_select, torch.flatten,
    torch.permute, torch.transpose, torch.reshape, F.pad,
}  # fmt: skip


def moves(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a function only moves what a tensor consists of, and pads with nothing but zeros."""
    if func is Tensor.view and isinstance(args[1], torch.dtype):
        return False
    if func is F.pad:
        given = dict(zip(("mode", "value"), args[2:], strict=False)) | options
        return given.get("mode", "constant") == "constant" and not given.get("value")
    return func in MOVES


class Operand(NamedTuple):
    """An operand of a product of integers.

    Args:
        terms: what it is.
        spec: what has quantized it.
    """

    terms: list[Term]
    spec: Spec

    def changed(self, change: Callable[[Tensor], Tensor]) -> Operand:
        """With integers and factors moved or repeated; a factor of one number stays."""
        moved = [Term(change(integers), change(factor) if factor.ndim > 1 else factor)
                 for integers, factor in self.terms]  # fmt: skip
        return Operand(moved, self.spec)

    def whole(self) -> Tensor:
        """The tensor."""
        return whole(self.terms)


class CodedTensor(Tensor):
    """A tensor with its operand, whose factors are single numbers."""

    operand: Operand | None  # None once its values were changed in place

    @staticmethod
    def of(values: Tensor, operand: Operand) -> CodedTensor:
        """The values, with what they consist of."""
        found = values.as_subclass(CodedTensor)
        found.operand = operand
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The same of the integers where they are only moved; a plain tensor otherwise."""
        given, kwargs = args[0] if args else None, kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            plain = [plain_tensor(arg) for arg in args]
            if func is F.dropout and not kwargs.get("training", True):
                return given
            out = func(*plain, **{name: plain_tensor(value) for name, value in kwargs.items()})
            if not isinstance(given, CodedTensor):
                return out
            if func is Tensor.__setitem__ or getattr(func, "__name__", "").rstrip("_") + "_" == func.__name__:
                given.operand = None  # it has other values now
            if given.operand is None or not moves(func, args, kwargs):
                return out
            moved = [(func(term.integers, *plain[1:], **kwargs), term.factor) for term in given.operand.terms]
            spec = given.operand.spec
            if isinstance(out, Tensor):
                return cls.of(out, Operand([Term(*term) for term in moved], spec))
            return tuple(
                cls.of(part, Operand([Term(integers[i], factor) for integers, factor in moved], spec))
                for i, part in enumerate(out)
            )


def plain_tensor(value: Any) -> Any:
    """A coded tensor, and those in a tuple or list, as what they are without codes."""
    if isinstance(value, CodedTensor):
        return value.as_subclass(Tensor)
    if isinstance(value, list | tuple) and any(isinstance(item, CodedTensor) for item in value):
        return type(value)(plain_tensor(item) for item in value)
    return value
