"""A quantized tensor as whole numbers: what a processor of integers multiplies. Shapes are those of the tensor.

    x = sum over terms of integers * factor

A grid has one term, and a second one, of ones, for an offset. A logarithm has its powers as shifts of a mantissa; one
to base sqrt2 has the even and the odd powers apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DEEPEST = 40  # shifts: what a power is cut to has 2**-40 of the largest one, and float32 has 2**-24 of a sum


class Term(NamedTuple):
    """Whole numbers times a factor.

    Args:
        integers: int64, the shape of the tensor.
        factor: floating point, broadcasts over them.
    """

    integers: Tensor
    factor: Tensor


def whole(terms: list[Term]) -> Tensor:
    """The tensor."""
    total, *others = (term.integers * term.factor for term in terms)
    return sum(others, total)


def shifted(mantissas: Tensor, shifts: Tensor, deepest: int) -> tuple[Tensor, float]:
    """Mantissas * 2**-shifts as integers, and the factor that they come with, a power of two.

    Args:
        mantissas, shifts: int64, not below zero.
        deepest: the largest shift that a code can have. Beyond `DEEPEST`, bits are cut off.
    """
    reach = min(deepest, DEEPEST)
    up, down = (reach - shifts).clamp(min=0), (shifts - reach).clamp(0, 63)
    return (mantissas << up) >> down, 2.0**-reach


def constant(value: Tensor, codes: Tensor) -> Term:
    """A value that all entries share."""
    return Term(torch.ones_like(codes, dtype=torch.int64), value)
