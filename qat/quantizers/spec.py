"""The options of a quantizer as plain data: a `Spec` checks itself, is stored in checkpoints, and builds its module."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from qat.errors import QatError
from qat.quantizers.layout import Granularity, Layout
from qat.ranges import check_value

Width = Literal["w_bits", "a_bits"]
MIN_BITS, MAX_BITS = 2, 16


@dataclass(frozen=True)
class Spec:
    """How one site is quantized; a subclass names the quantizer and adds its own options.

    Args:
        bits: width of a code, 2 to 16, or the word ``w_bits`` / ``a_bits`` until the recipe is filled.
        signed: codes run from ``-2**(bits-1)``; otherwise from 0.
        granularity: what shares a step: the whole ``tensor``, a ``channel``, a ``head``, or each of q, k, v (``qkv``).
    """

    bits: int | Width
    signed: bool = True
    granularity: Granularity = "tensor"

    kinds: ClassVar[dict[str, type[Spec]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.__module__.startswith("qat."):  # others are named by their dotted path, and cannot shadow ours
            Spec.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        for field in fields(self):
            if (kind := {"bool": bool, "float": float}.get(str(field.type), field.type)) in (bool, float):
                check_value(field.name, getattr(self, field.name), kind)
        number = isinstance(self.bits, int) and not isinstance(self.bits, bool) and MIN_BITS <= self.bits <= MAX_BITS
        if not number and self.bits not in get_args(Width):
            raise QatError(f"bits is {self.bits!r}: give {MIN_BITS} to {MAX_BITS}, or the word w_bits or a_bits")
        self.check_choice("granularity", Granularity)

    def check_choice(self, field: str, choices: Any) -> None:
        """Raise QatError unless the value of ``field`` is among the literals of ``choices``."""
        if getattr(self, field) not in get_args(choices):
            raise QatError(f"{field} is {getattr(self, field)!r}: choose from {', '.join(get_args(choices))}")

    @property
    def width(self) -> int:
        """The width as an integer; QatError while it is still a word."""
        if not isinstance(self.bits, int):
            raise QatError(f"bits is still the word {self.bits!r}: fill the recipe with a value for it")
        return self.bits

    @property
    def levels(self) -> int:
        """How many codes exist; ``2**bits`` unless a subclass declares otherwise."""
        return int(2**self.width)

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return int(-(2 ** (self.width - 1))) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.qmin + self.levels - 1

    @property
    def movable(self) -> bool:
        """The range may lie anywhere, and need not contain zero."""
        return False

    @property
    def holds_negatives(self) -> bool:
        """Some code stands for a negative value, wherever the range lies."""
        return self.signed or self.movable

    @property
    def search_grid(self) -> Spec:
        """The spec whose error tells how good a range is; another one where codes come from more than one value."""
        return self

    def per_channel(self) -> Spec | None:
        """The same codes with a step and a whole zero point for each channel; None where there is no such spec."""
        return None

    def build(self, layout: Layout) -> Any:  # a `Quantizer`, which stands on this file
        """The `Quantizer` that quantizes as this spec says, with parameters that are still to be calibrated."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `qat.recipe.spec_from_dict` reads back: what a checkpoint stores."""
        kind = type(self)
        path = kind.__name__ if kind.__module__.startswith("qat.") else f"{kind.__module__}.{kind.__qualname__}"
        return {"class_path": path, "init_args": {f.name: getattr(self, f.name) for f in fields(self)}}

    def describe_range(self) -> str:
        """The codes, for a table."""
        return f"{self.qmin}..{self.qmax}"
