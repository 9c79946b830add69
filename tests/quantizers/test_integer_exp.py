"""exp in integers: constants and values worked out by hand, and widths."""

from __future__ import annotations

import pytest
import torch

from qat.quantizers.integer_exp import Exp
from qat.quantizers.log_int_softmax import FINEST


def exp_of(step: float, keys: int) -> Exp:
    """The constants of a step."""
    return Exp.of(torch.tensor([step], dtype=torch.float64), keys)


def numbers(constants: Exp) -> tuple[int, ...]:
    """b, c, x0 and n as Python's integers."""
    return tuple(int(value) for value in constants)


def test_the_polynomial_at_a_step_of_one_sixteenth():
    table = exp_of(1 / 16, keys=197)
    assert numbers(table) == (43, 714, -12, 30)
    E = {
        0: 766651662336, -1: 721554505728, -5: 562640715776, -11: 388694540288, -12: 383325831168, -13: 360777252864,
        -24: 191662915584, -48: 47915728896, -100: 2340421632, -359: 724, -360: 714, -361: 714, -1000: 714,
    }  # fmt: skip
    assert table(torch.tensor(list(E))).tolist() == list(E.values())
    unit = 0.35815147 / 256 / 2**30
    assert [E[x] * unit for x in (0, -5, -24)] == pytest.approx([0.998906834, 0.73309129, 0.249726709])


@pytest.mark.parametrize(
    ("step", "constants"),
    [(0.05, (54, 1116, -14)), (0.02, (135, 6980, -35)), (0.1, (27, 279, -7)), (0.2, (13, 69, -4))],
)
def test_constants_of_other_steps(step, constants):
    assert numbers(exp_of(step, keys=197)) == (*constants, 30)


@pytest.mark.parametrize(("step", "one", "total"), [(0.2, 37, 44), (0.1, 39, 46), (0.05, 41, 48), (0.01, 45, 53)])
def test_widths_of_197_keys(step, one, total):
    c = int(exp_of(step, keys=197).c)
    assert (c << 30).bit_length() == one
    assert (197 * c << 30).bit_length() == total


@pytest.mark.parametrize("step", [FINEST / 2, FINEST, 0.01, 0.2, 1.0, 1.7, 50.0])
@pytest.mark.parametrize("keys", [1, 49, 197, 4096])
def test_sums_stay_below_what_float64_holds(step, keys):
    table = exp_of(step, keys)
    _, c, x0, n = numbers(table)
    E = table(torch.arange(n * x0 - 1, 1))
    assert E.max() == c << n
    assert E.min() >= 1
    assert keys * int(E.max()) + int(E.max()) // 2 < 2**53
    assert n >= 16  # a key that far away has a probability below every code of 4 bits
