"""Types and ranges of options: stated once, in the annotation of a field or an argument, and checked from there.

    lr: Annotated[float, Range(above=0)] = 5e-4
    workers: Annotated[int, Range(0)] | None = None

A dataclass calls `check_fields` in its ``__post_init__``; any other class decorates its ``__init__`` with `checked`.
The help of the command line describes an option from the same annotation (`describe_hint`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qat.errors import QatError

Method = TypeVar("Method", bound=Callable[..., Any])
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", dict: "a mapping"}
SHOWN = 80  # characters of a value in an error
ORDINALS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, each of which may be left out. NaN and infinity lie in no range.

    Args:
        low: smallest number.
        high: largest number.
        above: all numbers are larger than this; in place of ``low``.
        below: all numbers are smaller than this; in place of ``high``.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            _is_finite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {_shown_end(self.low)} to {_shown_end(self.high)}"
        words = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        return " and ".join(f"{word} {_shown_end(end)}" for word, end in words if end is not None)


SEED = Range(0, 2**32 - 1)  # what NumPy and torch both take
Seed = Annotated[int, SEED]


def check_fields(options: Any, prefix: str | None = None) -> None:
    """Check every field of a dataclass against its annotation.

    Args:
        options: the object, whose values are all set.
        prefix: what stands before the name of a field in an error; by default the name of the class and a colon.

    Raises:
        QatError: for the first value of a wrong type or out of its range.
    """
    kind: Any = type(options)
    prefix = f"{kind.__name__}: " if prefix is None else prefix
    hints = _hints(kind)
    for field in fields(options):
        check_value(f"{prefix}{field.name}", getattr(options, field.name), hints[field.name])


def checked(method: Method) -> Method:
    """Decorator of a method, such as ``__init__``, that checks its arguments against their annotations first."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def check_and_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        hints = get_type_hints(method, include_extras=True)
        for name, value in given.items():
            kind = signature.parameters[name].kind
            if name in hints and kind not in (kind.VAR_KEYWORD, kind.VAR_POSITIONAL):
                check_value(f"{type(self).__name__}: {name}", value, hints[name])
        return method(self, *args, **kwargs)

    return check_and_run  # type: ignore[return-value]


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise QatError, which calls the value ``name``, unless it has the type and lies in the range of ``hint``."""
    if not fits(value, hint):
        raise QatError(f"{name} is {shown(value)}: give {describe_hint(hint)}")


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, and cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"{'-' * (value < 0)}10**{SHOWN} or more"
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation, and lies in its range."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner, *ranges = parts
        return fits(value, inner) and all(_within(value, range_) for range_ in ranges if isinstance(range_, Range))
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is tuple:
        return isinstance(value, Sequence) and not isinstance(value, str) and _all_fit(value, parts)
    if origin is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(fits(v, parts[0]) for v in value)
    if isinstance(origin, type):
        return isinstance(value, origin)
    return _is_plain(value, hint)


def describe_hint(hint: Any) -> str:
    """What an annotation asks for, in words: ``an integer of at least 1 or null``."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _with_ranges(describe_hint(parts[0]), [part for part in parts[1:] if isinstance(part, Range)])
    if origin in (Union, UnionType):
        return _either([describe_hint(part) for part in parts if part is not NoneType], NoneType in parts)
    if origin is Literal:
        return _either([str(part) for part in parts])
    if origin is tuple and parts[-1] is not Ellipsis and len(set(parts)) == 1:
        return f"{ORDINALS.get(len(parts), len(parts))} values, each {describe_hint(parts[0])}"
    if origin in (list, Sequence) or (origin is tuple and parts[-1] is Ellipsis):
        return f"a list, each item {describe_hint(parts[0])}"
    return WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _all_fit(values: Sequence[Any], parts: Sequence[Any]) -> bool:
    if len(parts) == 2 and parts[1] is Ellipsis:
        return all(fits(value, parts[0]) for value in values)
    return len(values) == len(parts) and all(fits(value, part) for value, part in zip(values, parts, strict=True))


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is Any or not isinstance(kind, type):
        return True
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and _is_finite(value)
    if kind is Path:
        return isinstance(value, str | Path)
    return isinstance(value, kind)


def _shown_end(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) else str(end)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Integral) or math.isfinite(value)  # an integer may be too large for a float


def _within(value: Any, range_: Range) -> bool:
    number: Any = value
    return not isinstance(value, Real) or number in range_


def _with_ranges(words: str, ranges: Iterable[Range]) -> str:
    for range_ in ranges:
        words += f" of {range_}" if str(range_).startswith("at") else f" {range_}"
    return words


def _either(words: Sequence[str], or_null: bool = False) -> str:
    words = [*dict.fromkeys(words), *(["null"] if or_null else [])]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)
