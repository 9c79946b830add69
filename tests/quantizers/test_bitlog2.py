"""BitLog2 against integers, one by one, and worked examples. Shapes: B images, H heads, N tokens, D head width."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import BitLog2, BitLog2Quantizer
from qat.quantizers.bitlog2 import best_divisor, integers, leading_codes, leading_values
from qat.quantizers.spec import Layout

ACTIVATION = Layout(axis=0, groups=1, batched=True)
SCHEMES = {  # of the repository
    "single_16": BitLog2(4, form="single"),
    "single_17": BitLog2(4, form="single", extra=True),
    "half_16": BitLog2(4, form="half"),
    "half_17": BitLog2(4, form="half", extra=True),
}
SPECS = [
    BitLog2(bits, form=form, extra=extra)
    for bits in (2, 3, 4)
    for form in ("single", "half")
    for extra in (False, True)
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.form}-{s.levels}")
every_scheme = pytest.mark.parametrize("name", SCHEMES)

# x; value of single and half; code of half
INTEGERS = [
    ((0,), 0, 0, 0),
    ((1,), 1, 1, 1),
    ((2,), 2, 2, 2),
    ((3,), 2, 3, 3),
    ((4, 5), 4, 4, 4),
    ((6, 7), 4, 6, 5),
    ((8, 11), 8, 8, 6),
    ((12, 15), 8, 12, 7),
    ((16, 23), 16, 16, 8),
    ((24, 31), 16, 24, 9),
    ((32, 47), 32, 32, 10),
    ((48, 63), 32, 48, 11),
    ((64, 95), 64, 64, 12),
    ((96, 127), 64, 96, 13),
    ((128, 191), 128, 128, 14),
    ((192, 255), 128, 192, 15),
    ((256, 383), 256, 256, 16),
]
P = torch.tensor(
    [
        [0.62, 0.21, 0.09, 0.05, 0.02, 0.007, 0.0025, 0.0005],
        [0.30, 0.25, 0.20, 0.10, 0.08, 0.04, 0.02, 0.01],
        [0.97, 0.01, 0.008, 0.005, 0.003, 0.002, 0.001, 0.001],
    ],
    dtype=torch.float64,
)
DIVISORS = {"single_16": 21880, "single_17": 43761, "half_16": 206, "half_17": 290}
ROWS = {
    "single_16": [[16384, 4096, 2048, 1024, 512, 128, 64, 16]],
    "single_17": [[32768, 8192, 4096, 2048, 1024, 256, 128, 32]],
    "half_16": [[128, 48, 16, 12, 4, 1, 0, 0], [64, 64, 48, 24, 16, 8, 4, 2], [192, 2, 2, 1, 0, 0, 0, 0]],
    "half_17": [[192, 64, 32, 16, 6, 2, 0, 0], [96, 96, 64, 32, 24, 12, 6, 3], [256, 3, 3, 1, 1, 0, 0, 0]],
}


def reference(x: int, form: str) -> tuple[int, int]:
    """Code and value of an integer, by its definition."""
    if x == 0:
        return 0, 0
    k = x.bit_length() - 1
    if form == "single":
        return k + 1, 1 << k
    f = x >> (k - 1) & 1 if k else 0
    return (2 * k + f if k else 1), (2 + f << k) // 2


def bitlog2(spec: BitLog2, divisor: float = 1.0) -> BitLog2Quantizer:
    quantizer = spec.build(ACTIVATION)
    torch.nn.init.constant_(quantizer.step, 1 / divisor)
    return quantizer


def probabilities(x: Tensor, spec: BitLog2) -> Tensor:
    """The middle of the probabilities that become ``x``."""
    return (x.double() + 0.5) / spec.reach


def softmax(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).softmax(-1)


def test_the_ranges_of_the_repository():
    assert {name: spec.reach for name, spec in SCHEMES.items()} == {
        "single_16": 32768, "single_17": 65536, "half_16": 256, "half_17": 384,
    }  # fmt: skip
    assert [spec.levels for spec in SCHEMES.values()] == [16, 17, 16, 17]


@every_spec
def test_every_integer_has_its_code_and_value(spec):
    x = torch.arange(spec.reach, dtype=torch.int32)
    codes, values = (
        torch.tensor(column) for column in zip(*(reference(i, spec.form) for i in x.tolist()), strict=True)
    )
    assert torch.equal(leading_codes(x, spec.kept).long(), codes)
    assert torch.equal(integers(codes, spec.kept), values)
    assert codes.unique().tolist() == list(range(spec.levels))
    for p in (probabilities(x, spec), probabilities(x, spec).float()):
        assert torch.equal(leading_values(p, spec).long(), values)
        assert torch.equal(bitlog2(spec).encode(p).long(), codes)
        assert torch.equal(bitlog2(spec)(p).long(), values)


@every_spec
def test_the_range_is_the_value_of_the_first_code_that_does_not_exist(spec):
    assert integers(torch.tensor([spec.levels]), spec.kept).item() == spec.reach


@pytest.mark.parametrize(("xs", "single", "half", "code"), INTEGERS, ids=str)
def test_the_worked_integers(xs, single, half, code):
    x = torch.tensor(xs)
    assert integers(leading_codes(x, 0), 0).tolist() == [single] * len(xs)
    assert leading_codes(x, 1).tolist() == [code] * len(xs)
    assert integers(leading_codes(x, 1), 1).tolist() == [half] * len(xs)


@every_scheme
def test_the_worked_attention(name):
    quantizer, D = SCHEMES[name].build(ACTIVATION), DIVISORS[name]
    quantizer.init_from(P.reshape(1, -1))
    assert quantizer.divisor.item() == pytest.approx(D, rel=2e-7)  # its reciprocal is kept in float32
    values = torch.tensor(ROWS[name], dtype=torch.float64)
    torch.testing.assert_close(quantizer(P[: len(values)]).detach(), values / D, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "x", "codes"),
    [
        ("half_16", [97, 75, 48, 24, 9, 0, 0], [13, 12, 11, 9, 6, 0, 0]),
        ("single_16", [12417, 9704, 6208, 3104, 1213, 117, 1], [14, 14, 13, 12, 11, 7, 1]),
    ],
)
def test_the_worked_integer_exponentials(name, x, codes):
    spec = SCHEMES[name]
    assert leading_codes(torch.tensor(x), spec.kept).tolist() == codes
    assert bitlog2(spec).encode(probabilities(torch.tensor(x), spec)).tolist() == codes


@pytest.mark.parametrize("name", ["half_16", "half_17"])
@pytest.mark.parametrize("seed", range(4))
def test_the_divisor_is_what_a_search_finds(name, seed):
    spec, p = SCHEMES[name], softmax(20, 50, seed=seed).double().view(1, -1)
    values = leading_values(p, spec).double()
    tried = torch.arange(int(values.max()), spec.reach, dtype=torch.float64)
    errors = (p - values / tried[:, None]).square().mean(1)
    assert best_divisor(p, spec).item() == tried[errors.argmin()].item()


@every_scheme
def test_the_divisor_stays_within_the_search(name):
    spec = SCHEMES[name]
    largest = leading_values(torch.ones(1), spec).item()
    groups = torch.tensor(
        [[0.0, 0.0], [1.0, 1.0], [9.0, 9.0], [-1.0, 0.0]]
    )  # nothing, all, too much, less than nothing
    assert best_divisor(groups, spec).tolist() == [spec.reach - 1, largest, largest, spec.reach - 1]


def test_each_head_has_its_own_divisor():
    quantizer, p = BitLog2(4, granularity="head").build(Layout(1, 3, True)), softmax(2, 3, 9, 9)
    quantizer.init_from(quantizer.grouped(p))
    apart = torch.cat([best_divisor(p[:, h].reshape(1, -1), quantizer.spec) for h in range(3)])
    assert len(apart.unique()) == 3
    torch.testing.assert_close(quantizer.divisor.double(), apart, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["single_16", "half_16"])
@pytest.mark.parametrize(
    ("v_bits", "width"), [(4, {"half_16": 12, "single_16": 19}), (8, {"half_16": 16, "single_16": 23})]
)
def test_attention_times_values_is_shift_and_add(name, v_bits, width):
    spec, probs = SCHEMES[name], softmax(1, 2, 197, 197)  # (B, H, N, N)
    probs[0, 0, 0] = torch.tensor([0.5, 0.5] + [0.0] * 195)  # cutting takes nothing away: the largest sum
    quantizer = bitlog2(spec, DIVISORS[name])
    v = torch.randint(0, 2**v_bits, (1, 2, 197, 8), generator=torch.Generator().manual_seed(1))
    v[0, 0, :2, 0] = 2**v_bits - 1  # and the largest |code - zero point|
    c, keyed = quantizer.encode(probs).int()[..., None], v[:, :, None]  # (B, H, N, N, 1), (B, H, 1, N, D)
    if name == "single_16":
        terms = (keyed << (c - 1).clamp(min=0)).where(c > 0, 0)
    else:
        terms = (keyed * (2 + (c & 1)) << ((c >> 1) - 1).clamp(min=0)).where(c > 1, keyed * c)
    total = terms.sum(3)  # over the keys: (B, H, N, D)
    assert torch.equal(total, (integers(c[..., 0], spec.kept).double() @ v.double()).long())
    assert total.max() == total[0, 0, 0, 0] == (2**v_bits - 1) * spec.reach < 2 ** width[name]
    dequantized = quantizer(probs).detach().double() @ (v.double() * 0.21)
    torch.testing.assert_close(
        total.double() * (0.21 / DIVISORS[name]), dequantized, rtol=2e-7, atol=0
    )  # float32 values


@every_spec
def test_values_are_fixed_points_while_the_divisor_is_near_the_range(spec):
    codes = torch.arange(spec.levels)
    gain = 1.3 if spec.form == "half" else 1.9  # below 4/3, the step from 3 to 4, and below 2
    for divisor in (spec.reach, spec.reach / gain):
        quantizer = bitlog2(spec, divisor * (1 - 1e-6))  # rounding must not bring an integer below itself
        assert torch.equal(quantizer.encode(quantizer.decode(codes)).long(), codes)


def test_a_probability_of_one_is_the_largest_integer_and_cutting_rounds_down():
    quantizer = bitlog2(SCHEMES["half_16"], 256)
    p = torch.tensor([1.0, 2.0, float("inf"), 0.999, 191.9 / 256, 1 / 256, 0.9 / 256, 0.0, -0.5])
    assert (quantizer(p) * 256).tolist() == [192, 192, 192, 192, 128, 1, 0, 0, 0]


def test_gradients_of_a_worked_example():
    quantizer = bitlog2(SCHEMES["half_16"], 206)
    x = torch.tensor([1.0, 1.5, 0.62, 0.05, 0.0005, 0.0, -0.2], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    assert x.grad.tolist() == [1, 0, 3, 4, 5, 6, 0]
    assert quantizer.step.grad.item() == 1 * 192 + 2 * 192 + 3 * 128 + 4 * 12


def test_codes_grow_with_the_probability():
    for spec in SPECS:
        codes = bitlog2(spec).encode(torch.linspace(0, 1, 2000)).tolist()
        assert all(a <= b for a, b in pairwise(codes))


def test_a_forgotten_calibration_gives_nan():
    quantizer = BitLog2(4).build(ACTIVATION)
    assert not quantizer.calibrated
    assert quantizer(torch.rand(5)).isnan().all()


def test_project_keeps_the_step_positive():
    quantizer = bitlog2(BitLog2(4))
    torch.nn.init.constant_(quantizer.step, -1.0)
    quantizer.project_()
    assert quantizer.step.item() > 0


@pytest.mark.parametrize(
    ("option", "value"), [("signed", True), ("form", "quarter"), ("extra", 1), ("bits", 5), ("bits", 8)]
)
def test_an_option_out_of_range_is_refused_with_its_value(option, value):
    with pytest.raises(QatError, match=f"{option} is '?{value}"):
        BitLog2(**{"bits": 4, option: value})
