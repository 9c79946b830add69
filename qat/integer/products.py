"""Products of whole numbers, with the factors applied behind them.

    sum_k a_k b_k = sum over terms i of a, j of b:  (f_i g_j) * sum_k I_ik J_jk

The sum over k is one of integers: int32, or int64 where an int32 could overflow; where an int64 could, an operand is
cut into words of 24 bits, each with a sum of its own. So does a factor that changes along k, such as a step for each
head at a projection. An accumulator is converted to floating point, multiplied by both factors, and the bias is added:
that is all the floating point there is, once for every output (requantization).

Shapes: K entries that are summed, M and N rows of the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import QatError
from qat.integer.coded import Operand
from qat.quantizers.terms import Term

INT32, INT64 = 2**31 - 1, 2**63 - 1
WORD = 24  # bits
Pair = tuple[Term, Term]


class Accumulators:
    """What the integer products of a module have needed so far.

    Attributes:
        products: sums of integers for one output.
        bits: the width, with a sign, that holds every partial sum, in whatever order it is computed.
        operands: by what they are quantized.
        floats: whether a product was one of floats.
    """

    def __init__(self) -> None:
        self.products, self.bits, self.operands, self.floats = 0, 0, "", False

    def note(self, products: int, bound: int) -> None:
        """Remember a sum of integers."""
        self.products, self.bits = products, max(self.bits, bound.bit_length() + 1)

    def note_floats(self) -> None:
        """Remember a product of floats."""
        self.floats = True


def matrix_product(a: Operand, b: Operand, noted: Accumulators) -> Tensor:
    """a (..., M, K) times the transpose of b (..., N, K) or (N, K): (..., M, N)."""
    noted.operands = named(a, b)
    pairs = [pair for left in a.terms for right in b.terms for pair in aligned(left, right, -1)]
    return _sum(pairs, lambda x, y: x @ y.mT, lambda factor: factor.mT if factor.ndim > 1 else factor, (-1,), noted)


def convolution(a: Operand, b: Operand, options: dict[str, Any], noted: Accumulators) -> Tensor:
    """a (B, C, H, W), convolved with b (O, C / groups, kh, kw): (B, O, H', W').

    Raises:
        QatError: channels of one group have different factors.
    """
    groups, pairs, noted.operands = options["groups"], list[Pair](), named(a, b)
    for left in a.terms:
        for right in b.terms:
            if groups == 1:
                pairs += aligned(left, right, 1)
            elif groups == left.integers.shape[1] and left.factor.ndim > 1:  # one channel for each output
                factor = left.factor.repeat_interleave(len(right.integers) // groups, 1)
                pairs.append((Term(left.integers, factor), right))
            elif left.factor.numel() == 1:
                pairs.append((left, right))
            else:
                raise QatError("a convolution in groups, with a step for each channel, is no product of integers")

    def turned(factor: Tensor) -> Tensor:
        return factor.transpose(0, 1) if factor.ndim > 1 else factor

    return _sum(pairs, lambda x, y: F.conv2d(x, y, **options), turned, (1, 2, 3), noted)


def named(a: Operand, b: Operand) -> str:
    """By what two operands are quantized, in words."""
    return " x ".join(f"{type(spec).__name__}({spec.width})" for spec in (a.spec, b.spec))


def aligned(left: Term, right: Term, axis: int) -> Iterator[Pair]:
    """Parts of two terms along the axis that a product sums over, in each of which both factors are constant."""
    factors = [f for f in (left.factor, right.factor) if f.ndim > 1 and f.shape[axis] > 1]
    edges = sorted({edge for factor in factors for edge in _changes(factor, axis)})
    size = left.integers.shape[axis]
    for start, end in zip([0, *edges], [*edges, size], strict=True):
        yield _part(left, axis, start, end), _part(right, axis, start, end)


def _changes(factor: Tensor, axis: int) -> list[int]:
    """The places along an axis at which a factor is another one than before."""
    rows = factor.movedim(axis, 0).flatten(1)
    found: list[int] = ((rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1).tolist()
    return found


def _part(term: Term, axis: int, start: int, end: int) -> Term:
    integers, factor = term.integers.narrow(axis, start, end - start), term.factor
    return Term(integers, factor.narrow(axis, start, 1) if factor.ndim > 1 and factor.shape[axis] > 1 else factor)


def bound_of(a: Tensor, b: Tensor, axes: tuple[int, ...]) -> int:
    """The largest magnitude of any partial sum: the largest integer of one, times the largest sum over axes of b."""
    return int(a.abs().max()) * int(b.abs().sum(axes).max()) if a.numel() and b.numel() else 0


def in_words(left: Term, right: Term, axes: tuple[int, ...]) -> Iterator[Pair]:
    """Both terms; where a sum of their products could overflow 64 bits, the wider one in words of 24 bits."""
    if bound_of(left.integers, right.integers, axes) <= INT64:
        yield left, right
    elif left.integers.abs().max() >= right.integers.abs().max():
        for word in words(left):
            yield from in_words(word, right, axes)
    else:
        for word in words(right):
            yield from in_words(left, word, axes)


def words(term: Term) -> tuple[Term, Term]:
    """The lowest 24 bits, and the others."""
    low = term.integers & (2**WORD - 1)
    return Term(low, term.factor), Term(term.integers >> WORD, term.factor * 2.0**WORD)


def _sum(
    pairs: list[Pair], multiply: Callable[[Tensor, Tensor], Tensor], turned: Callable[[Tensor], Tensor],
    axes: tuple[int, ...], noted: Accumulators,
) -> Tensor:  # fmt: skip
    """The sum of products of integers, each times its factors; ``axes`` of the right operand are summed over."""
    parts, pairs = [], [pair for wide in pairs for pair in in_words(*wide, axes)]
    for left, right in pairs:
        bound = bound_of(left.integers, right.integers, axes)
        noted.note(len(pairs), bound)
        kind = torch.int32 if bound <= INT32 else torch.int64
        sums = multiply(left.integers.to(kind), right.integers.to(kind))
        factor = left.factor * turned(right.factor)
        parts.append(sums.to(factor.dtype) * factor)
    total, *others = parts
    return sum(others, total)
