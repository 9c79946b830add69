"""Reads a pickle without importing a module or calling anything but a few known functions.

It is torch.load's with another unpickler: pickle's own, written in Python, in which every operation that could call or
change something of the program is replaced.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor


class Foreign:
    """Stands for an object, a class or a function of a file that is not read.

    Args:
        name: dotted name of the class or function.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """The tensor that lies in a storage; an error where it would reach beyond it, for which torch allocates memory."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor has size {size} and stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    memory = storage._untyped_storage
    if 0 not in size and (last + 1) * storage.dtype.itemsize > memory.nbytes():
        raise pickle.UnpicklingError(f"a tensor of size {tuple(size)} is larger than its storage")
    return torch.empty(0, dtype=storage.dtype).set_(memory, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _typed(called: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """The tensor that a call makes; its class and its attributes are dropped."""
    known = any(called is function for function in (_tensor, _parameter))
    return called(*arguments) if known else Foreign("torch._tensor._rebuild_from_type_v2")


def _encoded(text: str, *_: Any) -> bytes:
    return text.encode("latin-1")  # how old protocols of pickle store bytes


CALLED: dict[str, Callable[..., Any]] = {  # all that is ever called
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": tuple,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "builtins.set": set,
    "__builtin__.set": set,
    "_codecs.encode": _encoded,
}


class InertUnpickler(pickle._Unpickler):  # the one written in Python can be changed
    """Reads a pickle without importing a module or calling anything but `CALLED`.

    A class or function that it does not know becomes a `Foreign`, and so does what comes from calling it; the state of
    objects is dropped, and items are added to plain lists, dictionaries and sets alone.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        """What may be called, a type of numbers, or a placeholder."""
        dotted = f"{module}.{name}"
        value = getattr(torch, name, None) if module == "torch" else None
        return value if isinstance(value, torch.dtype) else CALLED.get(dotted, Foreign(dotted))

    def call(self, called: Any, arguments: Any) -> Any:
        """The result of a call; a placeholder for what must not be called."""
        if any(called is known for known in CALLED.values()):
            return called(*arguments)
        return called if isinstance(called, Foreign) else Foreign(type(called).__name__)

    def on_reduce(self) -> None:
        """A call of what lies on the stack."""
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def on_newobj_ex(self) -> None:
        """An object made with named arguments."""
        del self.stack[-2:]
        self.stack[-1] = self.call(self.stack[-1], ()) if self.stack[-1] is OrderedDict else Foreign("an object")

    def on_inst(self) -> None:
        """An object in the oldest protocol, whose class is named in the text."""
        names = [self.readline()[:-1].decode("ascii", "replace") for _ in range(2)]  # type: ignore[attr-defined]
        self.pop_mark()
        self.stack.append(Foreign(".".join(names)))

    def on_obj(self) -> None:
        """An object in the oldest protocol, whose class lies on the stack."""
        first, *_ = self.pop_mark()
        self.stack.append(first if isinstance(first, Foreign) else Foreign("an object"))

    def on_build(self) -> None:
        """The state of an object: dropped."""
        self.stack.pop()

    def on_setitem(self) -> None:
        """One item of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self.add([key, value])

    def on_setitems(self) -> None:
        """Items of a dictionary."""
        self.add(self.pop_mark())

    def on_append(self) -> None:
        """One item of a list."""
        self.extend([self.stack.pop()])

    def on_appends(self) -> None:
        """Items of a list, or of a set."""
        self.extend(self.pop_mark())

    def on_extension(self) -> None:
        """A class by its number in a registry of this program."""
        raise pickle.UnpicklingError("the file names a class by its number")

    def add(self, items: list[Any]) -> None:
        """Put keys and values that take turns into the dictionary on top of the stack."""
        if type(table := self.stack[-1]) in (dict, OrderedDict, Counter):
            table.update(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(table, Foreign):
            raise pickle.UnpicklingError(f"a {type(table).__name__} takes no items")

    def extend(self, items: list[Any]) -> None:
        """Put items into the list or set on top of the stack."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            target.update(items)
        elif not isinstance(target, Foreign):
            raise pickle.UnpicklingError(f"a {type(target).__name__} takes no items")


InertUnpickler.dispatch |= {
    ord("R"): InertUnpickler.on_reduce,
    0x81: InertUnpickler.on_reduce,  # a new object of a class: for us a call of it
    0x92: InertUnpickler.on_newobj_ex,
    ord("i"): InertUnpickler.on_inst,
    ord("o"): InertUnpickler.on_obj,
    ord("b"): InertUnpickler.on_build,
    ord("s"): InertUnpickler.on_setitem,
    ord("u"): InertUnpickler.on_setitems,
    ord("a"): InertUnpickler.on_append,
    ord("e"): InertUnpickler.on_appends,
    0x90: InertUnpickler.on_appends,
    0x82: InertUnpickler.on_extension,
    0x83: InertUnpickler.on_extension,
    0x84: InertUnpickler.on_extension,
}


class InertPickle:
    """What torch.load expects of a module in place of ``pickle``."""

    __name__ = "inert pickle"
    Unpickler = InertUnpickler

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        """One pickled value; torch's oldest format holds several."""
        return InertUnpickler(file, **options).load()
