"""Integers in int64 and in float64: the same results, and those of Python's own integers."""

from math import isqrt as exact_isqrt

import pytest
import torch
from torch import Tensor

from qat.quantizers.integers import divide, isqrt, leading_bits, leading_one, rounded_log2, shift_right

POWERS = [2**k for k in range(53)]
EDGES = sorted({n for p in POWERS for n in (p - 1, p, p + 1, 3 * p // 2 - 1, 3 * p // 2) if 0 < n < 2**53})


def alike(*both: Tensor) -> list[int]:
    """The one result of int64 and float64."""
    exact, fast = both
    assert exact.dtype == torch.int64
    assert torch.equal(exact.double(), fast.double())
    return exact.tolist()


def log_uniform(count: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 ** (torch.rand(count, generator=generator, dtype=torch.float64) * bits)).long()


def test_leading_one_is_bit_length_less_one():
    x = torch.tensor(EDGES)
    assert alike(leading_one(x), leading_one(x.double())) == [n.bit_length() - 1 for n in EDGES]


def test_rounded_log2_of_the_table():
    table = {1: 0, 2: 1, 3: 2, 5: 2, 6: 3, 11: 3, 12: 4, 23: 4, 24: 5, 47: 5, 48: 6}
    table |= {24575: 14, 24576: 15, 49151: 15, 49152: 16}
    x = torch.tensor(list(table))
    assert alike(rounded_log2(x), rounded_log2(x.double())) == list(table.values())


def test_rounded_log2_looks_at_the_bit_below_the_leading_one():
    def expected(n: int) -> int:
        k = n.bit_length() - 1
        return k + (k > 0 and n >> (k - 1) & 1)

    x = torch.tensor(EDGES)
    assert alike(rounded_log2(x), rounded_log2(x.double())) == [expected(n) for n in EDGES]


@pytest.mark.parametrize("sign", [1, -1])
def test_leading_bits_cut_the_size(sign):
    def expected(n: int) -> int:
        low = max(0, n.bit_length() - 8)
        return sign * (n >> low << low)

    x = torch.tensor([0, *EDGES]) * sign
    assert alike(leading_bits(x, 8), leading_bits(x.double(), 8)) == [expected(n) for n in (0, *EDGES)]


def test_quotients_next_to_an_integer_are_not_rounded_up():
    b = log_uniform(100_000, 26)
    q = log_uniform(100_000, 26, seed=1)
    for a in (b * q - 1, b * q, b * q + 1):
        assert alike(divide(a, b), divide(a.double(), b.double())) == [
            n // d for n, d in zip(a.tolist(), b.tolist(), strict=True)
        ]
    assert (
        alike(divide(-b * q + 1, b), divide((-b * q + 1).double(), b.double())) == (1 - q).where(b > 1, 1 - q).tolist()
    )


def test_shift_right_rounds_down():
    x = torch.tensor([-5, -4, -1, 0, 3, 4, 2**52 + 1])
    assert alike(shift_right(x, 2), shift_right(x.double(), 2)) == [-2, -1, -1, 0, 0, 1, 2**50]


def test_isqrt_is_exact_where_float64_is_not():
    roots = [0, 1, 2, 1180, *(2**k + d for k in range(2, 31) for d in (-1, 0, 1))]
    squares = [n for r in roots for n in (r * r - 1, r * r, r * r + 1) if n >= 0]
    squares += (log_uniform(10_000, 44) << 16).tolist()
    assert isqrt(torch.tensor(squares)).tolist() == [exact_isqrt(n) for n in squares]
