"""AdaLog against exact arithmetic and worked numbers. Shapes: Q bases, P powers, G groups, n values in a group."""

from bisect import bisect_left
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache
from math import inf, nan

import pytest
import torch

from qat.errors import QatError
from qat.quantizers import AdaLog, AdaLogQuantizer, folded_bias
from qat.quantizers.adalog import SHIFT
from qat.quantizers.layout import Layout
from qat.quantizers.quantizer import MIN_STEP

WHOLE = Layout(axis=0, groups=1, batched=True)
BASES = range(10, 138)
NORMAL = Decimal(2) ** -126
X = [0.8, 0.3, 0.1, 0.02, 0.001]


def adalog(bits: int, base: float = 40.0, step: float = 1.0, zero: str = "last", shifted: bool = False):
    quantizer = AdaLog(bits, zero=zero, shifted=shifted).build(WHOLE)
    quantizer.set_({"step": torch.tensor([step]), "base": torch.tensor([base])})
    return quantizer


def every_base(bits: int, zero: str) -> AdaLogQuantizer:
    """A group for each base."""
    quantizer = AdaLog(bits, zero=zero).build(Layout(0, len(BASES), batched=False))
    bases = torch.tensor([float(q) for q in BASES])
    quantizer.set_({"step": torch.ones_like(bases), "base": bases})
    return quantizer


@cache
def exact_powers() -> list[Decimal]:
    """-2**(-k / 74), in ascending order, to 100 digits: all of a whole power of two that is a normal float."""
    with localcontext() as context:
        context.prec = 100
        octave, powers = [-(Decimal(2) ** (-Decimal(k) / 74)) for k in range(74)], []
        for _ in range(950):
            powers += octave
            octave = [x / 2 for x in octave]
        return powers


@cache
def exact_thresholds(q: int) -> list[Decimal]:
    """-2**(-(n + 1/2) q / 37) for n from 0 to 255."""
    return exact_powers()[q : 512 * q : 2 * q]


def exact_code(y: float, q: int, powers: int) -> int:
    """The code by definition: how many thresholds lie above, and of two codes that are as near the even one."""
    x, thresholds = Decimal(-y), exact_thresholds(q)
    if x > -NORMAL:
        return powers
    code = bisect_left(thresholds, x)
    tie = code < 256 and thresholds[code] == x
    return min(code + (tie and code % 2), powers)


def test_both_sides_of_every_threshold_of_every_base_have_the_exact_code():
    exact = torch.tensor([[-float(t) for t in exact_thresholds(q)] for q in BASES]).float()  # (Q, P)
    x = torch.cat([torch.nextafter(exact, exact * k) for k in (0, 1, 2)], 1)
    codes = torch.tensor([[exact_code(y, q, 256) for y in row] for q, row in zip(BASES, x.tolist(), strict=True)])
    for bits in range(2, 9):
        for zero in ("last", "extra"):
            quantizer = every_base(bits, zero)
            assert torch.equal(quantizer.encode(x).long(), codes.clamp(max=quantizer.spec.powers)), (bits, zero)


@pytest.mark.parametrize("q", [10, 37, 50, 137])
def test_every_bfloat16_from_0_to_1_has_the_exact_code(q):
    x = torch.arange(0x3F81, dtype=torch.int16).view(torch.bfloat16)
    assert (x[0], x[-1]) == (0, 1)
    expected = [exact_code(y, q, 255) for y in x.tolist()]
    for bits in (3, 8):
        quantizer = adalog(bits, q)
        assert quantizer.encode(x).tolist() == [min(code, quantizer.spec.powers) for code in expected]


def test_a_half_is_rounded_to_the_even_code():
    assert adalog(8, 74).encode(torch.tensor([0.5, 0.125, 2.0**-5])).tolist() == [0, 2, 2]  # 0.5, 1.5 and 2.5
    assert adalog(8, 10).encode(torch.tensor([2.0**-5])).tolist() == [18]  # 18.5: the only kind for other bases


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_and_values_are_those_of_the_definition(bits):
    quantizer = every_base(bits, "extra")
    top = 2 ** (bits + 1) - 2
    table = [int((Decimal(2) ** (-Decimal(j) / 37) * top).to_integral_value()) for j in range(37)]
    codes = torch.arange(2**bits + 1).expand(len(BASES), -1)
    parts = [[n * q for n in range(2**bits)] for q in BASES]
    mantissas, shifts = quantizer.integers(codes)
    assert mantissas.tolist() == [[table[p % 37] for p in row] + [0] for row in parts]
    assert shifts.tolist() == [[p // 37 for p in row] + [0] for row in parts]
    values = mantissas.double() / top * torch.exp2(-shifts.double())
    assert torch.equal(quantizer.decode(codes), values.float())  # step 1: a single rounding
    powers = torch.exp2(-torch.tensor(parts) / 37.0).double()  # of the formula without T: half a unit of M / 2 or more
    torch.testing.assert_close(values[:, :-1], powers, rtol=1 / top, atol=1e-30)


@pytest.mark.parametrize(("zero", "last"), [("last", 7), ("extra", 8)])
def test_the_worked_example(zero, last):
    quantizer = adalog(3, 40, 0.8, zero)
    assert quantizer.encode(torch.tensor(X)).tolist() == [0, 1, 3, 5, last]  # 9 is past the last power
    # n q is 0, 40, 120, 200: shifts 0, 1, 3, 5, and T[0, 3, 9, 15] = 14, 13, 12, 11 of 14
    expected = [0.8, 0.4 * 13 / 14, 0.1 * 12 / 14, 0.025 * 11 / 14, 0.0]
    torch.testing.assert_close(quantizer(torch.tensor(X)), torch.tensor(expected), rtol=2e-7, atol=0)  # two roundings
    published = torch.tensor([0.8, 0.37814, 0.084484, 0.018876, 0.0])  # without T, which is off by 1/14 at most
    torch.testing.assert_close(quantizer(torch.tensor(X)), published, rtol=1 / 14, atol=0)


def test_a_product_is_shifts_and_integers():
    quantizer = adalog(4, 31, 0.9)
    probs = (torch.randn(50, 197, generator=torch.Generator().manual_seed(0)) * 3).softmax(-1)
    v = torch.randint(-8, 8, (197, 16), generator=torch.Generator().manual_seed(1))
    mantissas, shifts = quantizer.integers(quantizer.encode(probs))
    assert int(shifts.max()) <= 12
    summed = (mantissas << 12 - shifts).double() @ v.double()  # below 2**53: exact
    ours = summed * (Fraction(1, 30 << 12) * Fraction(quantizer.step.item())).__float__()
    theirs = quantizer(probs).double() @ v.double()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # values are float32, and sums cancel


def test_gradients_of_a_worked_example():
    quantizer = adalog(3, 37, 0.5)
    #             above; code 0, 0, 1, 2; zero, zero, negative
    x = torch.tensor([0.51, 0.5, 0.4, 0.26, 0.12, 0.001, 0.0, -0.2], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 0, 0]
    assert quantizer.step.grad.item() == 1 + 2 + 3 + 4 / 2 + 5 / 4


def test_gradients_of_a_shifted_example():
    quantizer = adalog(3, 37, 0.5, shifted=True)
    x = torch.tensor([0.34, 0.33, 0.08, -0.1699], requires_grad=True)  # with the shift 0.51, 0.5, 0.25, 0.00007
    out = quantizer(x)
    assert out.tolist() == pytest.approx([0.5 - SHIFT, 0.5 - SHIFT, 0.25 - SHIFT, -SHIFT])
    out.backward(torch.tensor([1.0, 2, 3, 4]))
    assert x.grad.tolist() == [0, 2, 3, 0]
    assert quantizer.step.grad.item() == 1 + 2 + 3 / 2


def test_the_shift_may_be_left_to_the_bias():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(64, 20, generator=generator))
    weight, bias = torch.randn(8, 20, generator=generator), torch.randn(8, generator=generator)
    quantizer = adalog(4, 20, 2.5, shifted=True)
    unshifted = quantizer(x) + quantizer.shift
    mantissas, shifts = quantizer.integers(quantizer.encode(x))
    torch.testing.assert_close(unshifted, 2.5 * mantissas / 30 * torch.exp2(-shifts.float()), rtol=0, atol=3e-7)
    ours = unshifted @ weight.T + folded_bias(bias, weight, quantizer.shift)
    torch.testing.assert_close(ours, quantizer(x) @ weight.T + bias, rtol=0, atol=2e-5)  # float32 sums of 20
    assert adalog(4).shift == 0


def test_the_base_has_the_least_error_of_all():
    x = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) ** torch.tensor([[1.0], [9.0]])
    quantizer = AdaLog(3).build(Layout(0, 2, False))
    quantizer.init_from(x)
    bases = torch.tensor([float(q) for q in BASES])
    errors = torch.stack([(adalog(3, q)(x) - x).square().mean(1) for q in bases.tolist()])  # (Q, G)
    assert quantizer.base.tolist() == bases[errors.argmin(0)].tolist()
    assert quantizer.base[0] < quantizer.base[1]  # small values need a larger base
    assert quantizer.step.tolist() == [1, 1]
    quantizer.init_from(x * 3)
    assert quantizer.step.tolist() == (x * 3).amax(1).tolist()


def test_the_search_of_released_probabilities_has_every_base_and_the_present_step():
    quantizer = AdaLog(3, unit=True).build(Layout(0, 2, False))
    quantizer.set_({"step": torch.tensor([1.0, 0.5]), "base": torch.tensor([20.0, 30.0])})
    space = quantizer.search_space(torch.rand(2, 50))
    assert space.near(space.first) is None
    table = space.parameters(space.first)
    assert table["base"].tolist() == [[q, q] for q in BASES]
    assert table["step"].tolist() == [[1.0, 0.5]] * 128
    assert AdaLog(3, unit=True).build(Layout(0, 2, False)).search_space(torch.rand(2, 50)) is None, "no step yet"


def test_the_search_of_probabilities_looks_for_steps_below_the_largest_too():
    samples = torch.rand(2, 50)
    points = AdaLog(3).build(Layout(0, 2, False)).search_space(samples).first
    torch.testing.assert_close(points["step"].amax(0), samples.amax(1))
    torch.testing.assert_close(points["step"].amin(0), samples.amax(1) / 10)


def test_the_search_of_a_shifted_quantizer_closes_in_on_base_and_step():
    x = torch.nn.functional.gelu(torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)))
    quantizer = AdaLog(3, shifted=True).build(Layout(0, 2, False))
    quantizer.init_from(x)
    assert torch.equal(quantizer.step.detach(), x.amax(1) + SHIFT)
    space = quantizer.search_space(x)
    points = space.first
    assert len(points["base"]) == 16 * 8
    assert (points["base"].min(), points["base"].max()) == (10, 137)
    ninth = torch.stack([row[row > 0].quantile(0.9) for row in x])
    torch.testing.assert_close(points["step"].amin(0), ninth + SHIFT, rtol=1e-2, atol=0)  # the next larger sample
    assert torch.equal(points["step"].amax(0), x.amax(1) + SHIFT)
    best, errors = None, []
    for _ in range(4):
        table = space.parameters(points)
        assert all(values.shape[1] == 2 for values in table.values())
        k = len(table["base"])
        found = quantizer.tried(table)(x.expand(k, -1, -1).flatten(0, 1)).view(k, *x.shape)
        error, row = (found - x).square().mean(-1).min(0)
        errors.append(error.tolist())
        best = {name: values.gather(0, row[None]) for name, values in points.items()}
        points = space.near(best)
        assert points["base"].shape == (8, 2)
        assert torch.equal(points["base"], points["base"].round())
        assert (points["base"] - best["base"]).abs().max() <= best["base_gap"].max().clamp(min=1)
    assert min(row[0] for row in errors[1:]) < errors[0][0]


def test_what_is_not_a_number_stays_so_and_what_is_infinite_is_clipped():
    quantizer = adalog(3, 40, 0.5)
    x = torch.tensor([nan, -nan, inf, 3e38, -inf, -1.0, -0.0, 1e-45])
    assert quantizer(x)[:2].isnan().all()
    assert quantizer(x)[2:].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert quantizer.encode(x)[2:].tolist() == [0, 0, 7, 7, 7, 7]
    fresh = AdaLog(4).build(WHOLE)
    assert fresh(torch.rand(5)).isnan().all()
    assert not fresh.calibrated


def test_float64_stays_float64_and_the_step_stays_positive():
    x = torch.rand(50, dtype=torch.float64)
    assert torch.equal(adalog(4)(x), adalog(4)(x.float()).double())
    quantizer = AdaLog(4, shifted=True).build(WHOLE)
    quantizer.init_from(torch.full((1, 10), -1.0))
    assert quantizer.step.item() == pytest.approx(MIN_STEP)


@pytest.mark.parametrize(("option", "value"), [("signed", True), ("zero", "first"), ("bits", 9), ("shifted", "yes")])
def test_an_option_out_of_range_is_refused_with_its_value(option, value):
    with pytest.raises(QatError, match=f"{option}.*{value}"):
        AdaLog(**{"bits": 4, option: value})
