"""LogSqrt2 against worked tables and integer arithmetic. Shapes: B images, H heads, N tokens, D head width."""

from math import log2, sqrt

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import LogSqrt2, LogSqrt2Quantizer
from qat.quantizers.lsq import MIN_STEP
from qat.quantizers.spec import Layout

ACTIVATION = Layout(axis=0, groups=1, batched=True)
KINDS = ("last", "extra", "rounded")
ZERO = None  # the code of zero, in the tables

# p; t, and value of released RepQ-ViT (extra), for step 1; the same for step 0.85
TABLE = [
    (1.0, 0, 1.0, 0, 0.85),
    (0.9, 0, 1.0, 0, 0.85),
    (0.8, 1, 0.707106781, 0, 0.85),
    (0.6, 1, 0.707106781, 1, 0.601040764),
    (0.5, 2, 0.5, 2, 0.425),
    (0.3, 3, 0.353553391, 3, 0.300520382),
    (0.2, 5, 0.176776695, 4, 0.2125),
    (0.1, 7, 0.088388348, 6, 0.10625),
    (0.05, 9, 0.044194174, 8, 0.053125),
    (0.02, 11, 0.022097087, 11, 0.018782524),
    (0.01, 13, 0.011048543, 13, 0.009391262),
    (0.006, 15, 0.005524272, 14, 0.006640625),
    (0.005, 15, 0.005524272, 15, 0.004695631),
    (0.0045, ZERO, 0.0, 15, 0.004695631),
    (0.001, ZERO, 0.0, ZERO, 0.0),
    (0.0, ZERO, 0.0, ZERO, 0.0),
]
BOUNDARIES = [
    0.840896, 0.594604, 0.420448, 0.297302, 0.210224, 0.148651, 0.105112, 0.074325, 0.052556, 0.037163, 0.026278,
    0.018581, 0.013139, 0.009291, 0.006570, 0.004645,
]  # fmt: skip
VALUES = [
    1, 0.707106781, 0.5, 0.353553391, 0.25, 0.176776695, 0.125, 0.088388348, 0.0625, 0.044194174, 0.03125, 0.022097087,
    0.015625, 0.011048543, 0.0078125, 0.005524272,
]  # fmt: skip


def log_sqrt2(step: float = 1.0, zero: str = "last", bits: int = 4) -> LogSqrt2Quantizer:
    quantizer = LogSqrt2(bits, zero=zero).build(ACTIVATION)
    torch.nn.init.constant_(quantizer.step, step)
    return quantizer


def gradient(quantizer: LogSqrt2Quantizer, x: list[float], upstream: list[float]) -> Tensor:
    """d x; that of the step is left in its ``grad``."""
    leaf = torch.tensor(x, requires_grad=True)
    quantizer(leaf).backward(torch.tensor(upstream))
    return leaf.grad


def close(values: Tensor, expected: list[float]) -> None:
    """Within 1e-9, the last digit of a table, and 1e-7 relative, the rounding of float32."""
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-7)


def softmax(*shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).softmax(-1)


@pytest.mark.parametrize(("step", "column"), [(1.0, 1), (0.85, 3)])
def test_the_worked_table_of_released_repq_vit(step, column):
    quantizer, p = log_sqrt2(step, "extra"), torch.tensor([row[0] for row in TABLE])
    assert quantizer.encode(p).tolist() == [16 if row[column] is ZERO else row[column] for row in TABLE]
    close(quantizer(p).detach(), [row[column + 1] for row in TABLE])


@pytest.mark.parametrize(("zero", "t_15"), [("last", (15, 0.0)), ("rounded", (14, 0.0078125))])
def test_sixteen_levels_differ_from_seventeen_where_t_is_15(zero, t_15):
    quantizer, p = log_sqrt2(1.0, zero), torch.tensor([row[0] for row in TABLE])
    expected = [{15: t_15, ZERO: (15, 0.0)}.get(t, (t, value)) for _, t, value, *_ in TABLE]
    assert quantizer.encode(p).tolist() == [code for code, _ in expected]
    close(quantizer(p).detach(), [value for _, value in expected])


def test_every_boundary_and_every_value():
    quantizer = log_sqrt2(zero="extra")
    exact = torch.tensor([2 ** (-(k + 0.5) / 2) for k in range(16)], dtype=torch.float64)
    torch.testing.assert_close(exact, torch.tensor(BOUNDARIES, dtype=torch.float64), atol=5e-7, rtol=0)  # as printed
    for nudge, first in ((1 + 5e-7, 0), (1 - 5e-7, 1)):  # four roundings of float32
        assert quantizer.encode((exact * nudge).float()).tolist() == list(range(first, 16 + first))
    close(quantizer.decode(torch.arange(17)).detach(), [*VALUES, 0.0])


@pytest.mark.parametrize(("zero", "levels"), [("last", 16), ("extra", 17), ("rounded", 16)])
def test_levels_count_zero(zero, levels):
    spec = LogSqrt2(4, zero=zero)
    assert spec.levels == levels
    line = torch.logspace(-5, 0, 2000)
    assert log_sqrt2(zero=zero)(line).unique().numel() == levels


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("zero", KINDS)
def test_codes_are_those_of_the_formula(bits, zero):
    quantizer = log_sqrt2(0.85, zero, bits)
    spec = quantizer.spec
    x = torch.logspace(-20, 0, 30_001)
    exact = -2 * (x.double() / quantizer.step.detach().double()).log2()
    codes = exact.round().clamp(0, spec.powers - 1)
    codes[exact.round() >= spec.cutoff] = spec.powers
    far = (exact - exact.floor() - 0.5).abs() > 3e-6  # of a boundary: 1e-6 of the value is 2.9e-6 of t
    assert far.float().mean() > 0.999
    assert torch.equal(quantizer.encode(x)[far], codes[far].to(quantizer.code_dtype))


def integer_codes(attention: Tensor, one: int) -> Tensor:
    """Codes of integers in units of which the step has ``one``: 15 comparisons, no logarithm and no rounding."""
    smallest = []  # integer whose t is at most k: (a / one)**4 >= 2**-(2k + 1)
    for k in range(16):
        a = int(one * 2 ** (-(k + 0.5) / 2))
        while (a**4) << (2 * k + 1) < one**4:
            a += 1
        while ((a - 1) ** 4) << (2 * k + 1) >= one**4:
            a -= 1
        smallest.append(a)
    return (attention[:, None] < torch.tensor(smallest)).sum(1)


@pytest.mark.parametrize("one", [65536, 55706, 32768, 12345])
def test_integer_thresholds_give_the_same_codes(one):
    attention = torch.arange(65536)
    quantizer = log_sqrt2(one / 65536, "extra")
    assert torch.equal(quantizer.encode(attention / 65536).long(), integer_codes(attention, one))


@pytest.mark.parametrize("zero", KINDS)
def test_attention_times_values_is_two_shift_accumulators(zero):
    quantizer, probs = log_sqrt2(0.93, zero), softmax(2, 3, 197, 197)  # (B, H, N, N)
    v = torch.randint(0, 16, (2, 3, 197, 64), generator=torch.Generator().manual_seed(1)) - 6  # code - zero point
    codes = quantizer.encode(probs).long()
    shifts = (1 << 7 - codes // 2).where(codes < quantizer.spec.powers, 0)  # nothing for zero
    even = shifts.where(codes % 2 == 0, 0).double() @ v.double()  # float64 holds these integers
    odd = shifts.where(codes % 2 == 1, 0).double() @ v.double()  # twice 2**-ceil(c / 2): sqrt2 / 2 makes up for it
    assert max(even.abs().max(), odd.abs().max()) < 2**21
    scale = 0.93 * 0.21 / 128
    ours, theirs = scale * (even + sqrt(0.5) * odd), quantizer(probs).detach().double() @ (v.double() * 0.21)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # values rounded to float32, in sums that cancel
    cheap = scale * (even + odd * 46341 / 65536)  # sqrt2 / 2 once per output, as an integer
    assert ((cheap - ours).abs() <= 1.1e-6 * scale * odd.abs()).all()


@pytest.mark.parametrize("bits", [4, 7, 8])
def test_float64_stays_float64(bits):
    x = softmax(4, 50).double()
    out = log_sqrt2(0.85, bits=bits)(x)
    assert out.dtype == torch.float64
    assert torch.equal(log_sqrt2(0.85, bits=bits).encode(x), log_sqrt2(0.85, bits=bits).encode(x.float()))


def test_gradients_of_a_worked_example():
    quantizer = log_sqrt2(0.5)
    #    clipped; in code 0 and above the step; code 0, 1, 2; zero; negative
    x = [0.60, 0.59, 0.48, 0.36, 0.25, 0.001, 0.0, -0.2]
    d_x = gradient(quantizer, x, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert d_x.tolist() == [0, 2, 3, 4, 5, 0, 0, 0]
    assert quantizer.step.grad.item() == pytest.approx(1 + 2 + 3 + 4 * sqrt(0.5) + 5 * 0.5, rel=1e-6)  # float32


def test_the_gradient_of_the_step_is_the_slope_of_the_values():
    quantizer, x = log_sqrt2(0.9), softmax(3, 50)
    quantizer(x).square().sum().backward()
    slope = 2 * quantizer(x).square().sum() / 0.9  # the values are proportional to the step
    assert quantizer.step.grad.item() == pytest.approx(slope.item(), rel=1e-5)  # float32 sums


@pytest.mark.parametrize("zero", KINDS)
def test_nothing_but_finite_numbers_from_zeros_and_negatives(zero):
    quantizer, x = log_sqrt2(zero=zero), torch.tensor([0.0, -0.0, -1.0, -float("inf"), 1e-45], requires_grad=True)
    out = quantizer(x)
    out.sum().backward()
    assert out.tolist() == [0] * 5
    assert quantizer.encode(x).tolist() == [quantizer.spec.powers] * 5
    assert x.grad.tolist() == [0] * 5
    assert quantizer.step.grad.item() == 0


def test_an_infinite_value_is_clipped_like_any_large_one():
    assert log_sqrt2(0.5)(torch.tensor([float("inf"), 3e38])).tolist() == [0.5, 0.5]


def test_the_step_is_the_upper_end_of_a_range_and_stays_positive():
    quantizer = LogSqrt2(4, granularity="head").build(Layout(1, 3, True))
    quantizer.set_range_(torch.zeros(3), torch.tensor([0.5, 0.0, 2.0]))
    assert quantizer.step.tolist() == pytest.approx([0.5, MIN_STEP, 2.0])
    quantizer.init_from(torch.tensor([[0.1, 0.7], [0.0, 0.0], [0.3, 0.2]]))
    assert quantizer.step.tolist() == pytest.approx([0.7, MIN_STEP, 0.3])
    torch.nn.init.constant_(quantizer.step, -1.0)
    quantizer.project_()
    assert quantizer.step.tolist() == pytest.approx([MIN_STEP] * 3)


def test_a_forgotten_calibration_gives_nan():
    quantizer = LogSqrt2(4).build(ACTIVATION)
    assert not quantizer.calibrated
    assert quantizer(torch.rand(5)).isnan().all()


@pytest.mark.parametrize(("option", "value"), [("signed", True), ("zero", "first"), ("bits", 9), ("bits", 16)])
def test_an_option_out_of_range_is_refused_with_its_value(option, value):
    with pytest.raises(QatError, match=f"{option} is '?{value}"):
        LogSqrt2(**{"bits": 4, option: value})


def test_the_table_is_the_formula():
    assert [round(-2 * log2(p)) for p, t, *_ in TABLE if t is not ZERO] == [t for _, t, *_ in TABLE if t is not ZERO]
