"""Lookup tables of AdaLog: codes and values of floats for every base, exactly and without a logarithm.

The threshold of a code is the smallest float32 that has it, or a smaller code. Neighbouring thresholds differ by a
factor of 2**(10 / 37) = 1.206 or more, so a cell of floats that share sign, exponent and three bits of the mantissa, a
factor of 1.125 or less, has at most one. ``reach`` says what to add to the bits of a float so that it leaves its cell
exactly where it reaches the threshold; the code belongs to the cell in which it is then. That takes two lookups.

A threshold is computed in float64. It is irrational, and further from any float32 than float64 rounds, or it is a whole
power of two, which float64 has; there the formula is at a half, and rounds it to the even code. Ratios below 2**-126,
which are no normal floats, count as zero, whatever the base.
Shapes: Q bases, P powers, C cells.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantizers.kernels import wide

PARTS = 37  # of an octave
LEAST, MOST = 10, 137  # the bases, as numerators q
CELL_BITS = 20  # of a float32 that tell floats of one cell apart
HALF = 1 << 31 - CELL_BITS  # cells of positive floats; those of negative ones come before them
NORMAL, NAN = 8, HALF - 4  # the first cell of normal floats, and of numbers that are none


class Tables(NamedTuple):
    """For every base, from `LEAST` on."""

    reach: Tensor  # (Q, C) int32: what makes a float that reaches the threshold of its cell leave it
    codes: Tensor  # (Q, C) int32: of what is below the threshold
    values: Tensor  # (Q, C): of those codes, in units of the step
    powers: Tensor  # (Q, P + 1): the value of each code


def denominator(bits: int) -> int:
    """M: the value of code 0 as an integer."""
    return (2 << bits) - 2


def mantissas(bits: int) -> Tensor:
    """M * T (37,): whole numbers, float64, from M down to M / 2."""
    return (denominator(bits) * torch.exp2(-torch.arange(PARTS, dtype=torch.float64) / PARTS)).round()


@cache
def tables(bits: int, powers: int, device: torch.device) -> Tables:
    """The tables of a width and a number of powers."""
    if device.type != "cpu":
        return Tables(*(x.to(device) for x in tables(bits, powers, torch.device("cpu"))))
    with torch.inference_mode(False):
        q = torch.arange(LEAST, MOST + 1)[:, None]
        edge = thresholds(q, powers).view(torch.int32)
        cell = (edge >> CELL_BITS).long() + HALF
        reach = torch.zeros(len(q), 2 * HALF, dtype=torch.int32)
        reach.scatter_(1, cell, (cell.int() + 1 - HALF << CELL_BITS) - edge)
        codes = torch.zeros(len(q), 2 * HALF, dtype=torch.int32)
        codes = codes.scatter_add_(1, cell, torch.ones_like(edge)).flip(1).cumsum(1, dtype=torch.int32).flip(1)
        codes[:, : HALF + NORMAL] = codes[:, HALF + NAN :] = powers
        reach[:, : HALF + NORMAL] = 0
        values = _values(bits, q, powers)
        found = values.gather(1, codes.long())
        found[:, HALF + NAN :] = found[:, NAN:HALF] = torch.nan
        return Tables(reach, codes, found, values)


def thresholds(q: Tensor, powers: int) -> Tensor:
    """The smallest float32 (Q, P) whose code is at most 0, 1, 2 and so on; numerators q (Q, 1), int64."""
    twice = 2 * torch.arange(powers) + 1
    exact = torch.exp2(-(twice * q).double() / (2 * PARTS))
    near = exact.float()
    above = torch.nextafter(near, torch.ones(()))
    upper_is_even = (twice * q % (2 * PARTS) == 0) & (twice % 4 == 3)  # a half between an odd code and an even one
    return torch.where((near.double() < exact) | upper_is_even, above, near)


def cells(x: Tensor, step: Tensor, rows: Tensor, reach: Tensor, shift: float) -> Tensor:
    """Where (x + shift) / step ends in a table, int32, in the shape of ``x``.

    Args:
        x: any dtype; what is divided has float32 or better, and the quotient is a float32.
        step, rows: the step, and the row of the base; they broadcast over ``x``.
        reach: as in `Tables`.
        shift: what is added.
    """
    x, ratio = x.to(wide(x)), torch.empty(x.shape, device=x.device)
    x = torch.add(x, shift, out=ratio if x.dtype == ratio.dtype else None) if shift else x
    if x.dtype == ratio.dtype:
        torch.div(x, step, out=ratio)
    else:
        ratio.copy_(x / step)
    bits, first = ratio.view(torch.int32), rows * (2 * HALF) + HALF
    bits += picked(reach, (bits >> CELL_BITS).add_(first))
    return bits.bitwise_right_shift_(CELL_BITS).add_(first)


def picked(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table, of all its rows in a line, in the shape of the index."""
    return table.view(-1).index_select(0, index.view(-1)).view(index.shape)


def _values(bits: int, q: Tensor, powers: int) -> Tensor:
    """The value (Q, P + 1) of each code in units of the step, float32; that of the last is 0."""
    parts = torch.arange(powers) * q
    values = mantissas(bits)[parts % PARTS] / denominator(bits) * torch.exp2(-(parts // PARTS).double())
    return torch.cat([values.float(), torch.zeros(len(q), 1)], 1)
