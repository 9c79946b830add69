"""Arithmetic on integers that runs alike on int64 and on float64 tensors, bit for bit.

int64 is what hardware would do; float64 is what processors do fast. It is exact: a float64 holds every integer below
2**53, sums and products are exact while they stay below, and so is the integer part of a quotient of two. (A quotient
a / b below an integer m is at least 1 / b below it, and that is more than half the distance from m to the float before
it, because a < 2**53: it is not rounded up to m.)
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_BITS = 53
MANTISSA, BIAS = 52, 1023  # of a float64: a sign, 11 bits of exponent, 52 bits that follow the leading one
# Integer type, bits that follow the leading one, and bias of the exponent.
FIELDS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, MANTISSA, BIAS)}


def divide(a: Tensor, b: Tensor) -> Tensor:
    """The integer part of a / b, for b > 0; that of a negative quotient is nearer to zero."""
    return torch.div(a, b, rounding_mode="trunc")


def shift_right(x: Tensor, bits: int) -> Tensor:
    """x / 2**bits, rounded down."""
    return (x * 2.0**-bits).floor_() if x.is_floating_point() else x >> bits


def isqrt(x: Tensor) -> Tensor:
    """The integer part of the square root of x, int64 and below 2**62."""
    root = x.double().sqrt().long()  # x was rounded to 53 bits: off by one at most
    root = root - (root * root > x).long()
    return root + ((root + 1) * (root + 1) <= x)


def leading_one(x: Tensor) -> Tensor:
    """Position of the leading one of x > 0, int64: 0 for 1, 1 for 2 and 3, 2 for 4 to 7."""
    if x.is_floating_point():
        return (x.view(torch.int64) >> MANTISSA) - BIAS
    position, rest = torch.zeros_like(x), x
    for bits in (32, 16, 8, 4, 2, 1):  # compare and shift
        large = rest >= 2**bits
        position = position + bits * large
        rest = torch.where(large, rest >> bits, rest)
    return position


def rounded_log2(x: Tensor) -> Tensor:
    """Position of the leading one of x > 0, and 1 more where the bit below it is set: from 1.5 * 2**k on."""
    if x.is_floating_point():  # adding that bit to itself carries into the exponent
        return (x.view(torch.int64).add(1 << (MANTISSA - 1)) >> MANTISSA).sub_(BIAS)
    position = leading_one(x)
    return position + (2 * x >= torch.full_like(x, 3) << position)


def rounded_power_(x: Tensor) -> Tensor:
    """2 to the power of `rounded_log2`, for x > 0 in floating point; in place."""
    integer, mantissa, _ = FIELDS[x.dtype]
    x.view(integer).add_(1 << (mantissa - 1)).bitwise_and_(-1 << mantissa)
    return x


def leading_bits(x: Tensor, bits: int) -> Tensor:
    """x with all but the ``bits`` bits from its leading one on cleared; the sign stays."""
    if x.is_floating_point():
        return (x.view(torch.int64) & (-1 << (MANTISSA + 1 - bits))).view(x.dtype)
    size = x.abs()
    low = (leading_one(size.clamp(min=1)) - (bits - 1)).clamp(min=0)
    return x.sign() * (size >> low << low)
