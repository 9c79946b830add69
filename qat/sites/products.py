"""The matrix products of a quantized module, as the module itself states them: their cost, and how they are computed.

Shapes: I inputs, O outputs, n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Matrices(NamedTuple):
    """Both operands of a product as matrices: for every matrix of a batch, left (n, I) times right (O, I), transposed.

    Args:
        left, right: from the tensor at the site, perhaps with axes before its own, to (..., n, I) and (..., O, I).
        axes: for both, the axis of that tensor along which parts have rows of their own; None where no axis has.
        samples: from what reaches a site of activations to samples along the first axis.
        rows_of: how many rows n of the output come from one of the samples.
        weight: the right operand of a layer; None for a product of two activations.
    """

    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    axes: tuple[int | None, int | None]
    samples: Callable[[Tensor], Tensor]
    rows_of: Callable[[Tensor], int]
    weight: Tensor | None = None


class Product(NamedTuple):
    """One matrix product of a module.

    Args:
        left, right: names of the sites of both operands, in the module.
        macs: multiply-accumulates, from the shape of an input of the module.
        matrices: the operands as matrices; None where they are not (a convolution that pads), or where what passes the
            site is not the operand (the scores of a softmax that is quantized as a whole).
    """

    left: str
    right: str
    macs: Callable[[tuple[int, ...]], int]
    matrices: Matrices | None = None


class HasProducts(Protocol):
    """A quantized module says what it multiplies."""

    def products(self) -> list[Product]:
        """Every product of one application of the module."""


def same(x: Tensor) -> Tensor:
    """The tensor itself, where it is a matrix already."""
    return x
