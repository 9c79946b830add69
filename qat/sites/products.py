"""The matrix products that a quantized module states: what they cost, and how they are computed.

Shapes: I inputs, O outputs, n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Matrices(NamedTuple):
    """Both operands of a product as matrices: each product is left (n, I) times the transpose of right (O, I).

    Args:
        left, right: map the tensor at the site, perhaps with axes before its own, to (..., n, I) and (..., O, I).
        axes: for each operand, the axis of that tensor whose slices have different rows; None where every slice has a
            part of every row.
        samples: maps the tensor at an activation site to samples along the first axis.
        rows_of: the number of rows n that one sample gives.
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
        matrices: the operands as matrices; None where the tensor at a site is not the operand: a convolution that pads,
            or a softmax that is quantized as a whole, whose site has the scores.
    """

    left: str
    right: str
    macs: Callable[[tuple[int, ...]], int]
    matrices: Matrices | None = None


class HasProducts(Protocol):
    """A quantized module that multiplies tensors."""

    def products(self) -> list[Product]:
        """The products that one forward computes."""


def same(x: Tensor) -> Tensor:
    """Return the tensor itself: it is a matrix already."""
    return x
