"""TwinSoftmax against worked numbers and integer products. Shapes: N tokens, D head width, G groups, K candidates."""

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import TwinSoftmax, TwinSoftmaxQuantizer
from qat.quantizers.layout import Layout
from qat.quantizers.quantizer import MIN_STEP

WHOLE = Layout(axis=0, groups=1, batched=True)
X = [1.0, 0.9, 0.5, 0.2, 0.06, 0.0312, 0.03, 0.01, 0.004, 0.001, 0.0002, 0.0]
EIGHT = [  # m = 5: range bit, magnitude, value
    (1, 127, 0.9921875), (1, 115, 0.8984375), (1, 64, 0.5), (1, 26, 0.203125), (1, 8, 0.0625),
    (0, 127, 0.031005859375), (0, 123, 0.030029296875), (0, 41, 0.010009765625), (0, 16, 0.00390625),
    (0, 4, 0.0009765625), (0, 1, 0.000244140625), (0, 0, 0.0),
]  # fmt: skip
SIX = [  # m = 3; 0.0312 is 8 fine steps, too
    (1, 31, 0.96875), (1, 29, 0.90625), (1, 16, 0.5), (1, 6, 0.1875), (0, 15, 0.05859375), (0, 8, 0.03125),
    (0, 8, 0.03125), (0, 3, 0.01171875), (0, 1, 0.00390625), (0, 0, 0.0), (0, 0, 0.0), (0, 0, 0.0),
]  # fmt: skip


def twin(bits: int, exponent: int, overlap: bool = False) -> TwinSoftmaxQuantizer:
    quantizer = TwinSoftmax(bits, overlap=overlap).build(WHOLE)
    step = 1 / (2 ** (bits - 1) - overlap)
    quantizer.set_({"step": torch.tensor([step]), "exponent": torch.tensor([float(exponent)])})
    return quantizer


def softmax(*shape: int, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).softmax(-1)


@pytest.mark.parametrize(("bits", "exponent", "table"), [(8, 5, EIGHT), (6, 3, SIX)])
def test_the_worked_tables(bits, exponent, table):
    quantizer, x = twin(bits, exponent), torch.tensor(X)
    codes, half = quantizer.encode(x).int(), 2 ** (bits - 1)
    assert list(zip((codes // half).tolist(), (codes % half).tolist(), strict=True)) == [row[:2] for row in table]
    assert quantizer(x).tolist() == [row[2] for row in table]  # steps are powers of two: exact


@pytest.mark.parametrize(
    ("exponent", "x", "expected"),
    [
        (5, [0.9, 0.5, 0.2, 0.01, 0.001], [0.928888, 0.535187, 0.228100, 0.041585, 0.032480]),
        (8, [0.9, 0.5, 0.01, 0.002, 0.001], [0.901544, 0.507843, 0.011780, 0.001999, 0.001015]),
    ],
)
def test_the_worked_tables_of_the_released_form(exponent, x, expected):
    found = twin(8, exponent, overlap=True)(torch.tensor(x))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=6e-7)  # half of the last digit, rounding


def test_rows_sum_to_one_but_in_the_released_form():
    even = torch.full((1, 197), 1 / 197)  # spread evenly over 197 tokens
    for exponent in (2, 4, 5):
        assert twin(8, exponent)(even).sum().item() == pytest.approx(1, abs=197 * 2.0**-8 * 2.0**-exponent)
    # at 2**-7 and beyond 1 / 197 is coarse, one step of 1 / 128: the choice of the exponent has to prevent it
    for exponent, total in ((5, 7.22), (7, 2.56), (8, 2.32), (9, 1.94), (10, 1.74)):
        assert twin(8, exponent, overlap=True)(even).sum().item() == pytest.approx(total, abs=6e-3)
    probs = softmax(64, 197)
    fitted = TwinSoftmax(8).build(WHOLE)
    fitted.init_from(probs.view(1, -1))
    assert (fitted(probs).sum(-1) - 1).abs().max() < 0.02  # a sum of 197 errors of half a fine step, at random


@pytest.mark.parametrize(("bits", "exponent"), [(8, 5), (6, 3), (4, 0), (3, 7)])
def test_two_integer_products_aligned_by_a_shift_are_the_product(bits, exponent):
    quantizer, probs = twin(bits, exponent), softmax(50, 197)  # (N, N)
    v = torch.randint(-128, 128, (197, 16), generator=torch.Generator().manual_seed(1))  # (N, D)
    codes, half = quantizer.encode(probs).long(), 2 ** (bits - 1)
    coarse = codes >= half
    low, high = torch.where(coarse, 0, codes % half), torch.where(coarse, codes % half, 0)
    summed = low @ v + ((high @ v) << exponent)
    fine = 2.0 ** (1 - bits - exponent)
    assert torch.equal(summed.double() * fine, quantizer(probs).detach().double() @ v.double())  # below 2**53: exact
    mantissas, shifts = quantizer.integers(quantizer.encode(probs))
    assert torch.equal((mantissas << shifts) @ v, summed)


def test_every_code_is_unpacked_into_range_and_magnitude_and_has_its_value():
    quantizer = twin(4, 3)
    mantissas, shifts = quantizer.integers(torch.arange(16, dtype=torch.uint8))
    assert mantissas.tolist() == [*range(8), *range(8)]
    assert shifts.tolist() == [0] * 8 + [3] * 8
    assert quantizer.decode(torch.arange(16)).tolist() == [k / 64 for k in range(8)] + [k / 8 for k in range(8)]
    reached = quantizer.encode(quantizer.decode(torch.arange(16))).tolist()
    assert reached == [*range(8), 0, *range(9, 16)]  # of two codes for a value, here 0, that of the fine grid


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 4, 9])
def test_the_levels_of_the_released_form(exponent):
    quantizer, line = twin(4, exponent, overlap=True), torch.linspace(0, 1, 100_001)
    first = round(7 / 2**exponent)  # the magnitude of the coarse grid next to zero
    assert quantizer.spec.levels == 15
    assert quantizer(line).unique().numel() == 15 - first
    codes = quantizer.encode(line)
    assert codes.unique().tolist() == list(range(first, 15))
    assert torch.equal(quantizer.decode(codes), quantizer(line))


@pytest.mark.parametrize("overlap", [False, True])
def test_calibration_finds_the_exponent_of_least_error(overlap):
    x = torch.stack([softmax(20, 50, scale=1).flatten(), softmax(20, 50, scale=6).flatten()])  # (G, n)
    quantizer = TwinSoftmax(4, overlap=overlap).build(Layout(0, 2, batched=False))
    quantizer.init_from(x)
    errors = torch.stack([(twin(4, m, overlap)(x) - x).square().mean(1) for m in range(20)])  # (K, G)
    assert quantizer.exponent.tolist() == errors.argmin(0).tolist()
    assert quantizer.step.tolist() == pytest.approx([1 / (8 - overlap)] * 2)


def test_the_search_has_twenty_splits_and_the_present_step():
    quantizer = TwinSoftmax(4).build(Layout(0, 2, batched=False))
    quantizer.set_({"step": torch.tensor([0.125, 0.1]), "exponent": torch.tensor([3.0, 4.0])})
    space = quantizer.search_space(torch.rand(2, 10))
    table = space.parameters(space.first)
    assert table["exponent"].tolist() == [[m, m] for m in range(20)]
    assert torch.equal(table["step"], quantizer.step.detach().expand(20, -1))
    assert space.near(space.first) is None


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients(overlap):
    quantizer = twin(4, 2, overlap)  # fine up to 0.25
    x = torch.tensor([1.5, 0.8, 0.3, 0.1, 0.0, -0.1], requires_grad=True)
    g = torch.tensor([1.0, 2, 3, 4, 5, 6])
    out = quantizer(x)
    out.backward(g)
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]
    slope = (g * out.detach()).sum() / quantizer.step.detach()  # the values are proportional to the step
    torch.testing.assert_close(quantizer.step.grad, slope, rtol=1e-6, atol=0)
    if not overlap:
        assert quantizer.step.grad.item() == 1 * 7 + 2 * 6 + 3 * 2 + 4 * 3 / 4


def test_what_is_not_a_number_stays_so_and_the_step_stays_positive():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for overlap in (False, True):
        found = twin(4, 2, overlap)(x).tolist()
        assert found[0] != found[0]
        assert found[1] >= 7 / 8
        assert TwinSoftmax(4, overlap=overlap).build(WHOLE)(torch.rand(3)).isnan().all()  # not calibrated
    assert twin(4, 2)(x)[2] == 0
    quantizer = twin(4, 2)
    torch.nn.init.constant_(quantizer.step, -1.0)
    quantizer.project_()
    assert quantizer.step.item() == pytest.approx(MIN_STEP)


@pytest.mark.parametrize(("option", "value"), [("signed", True), ("overlap", "yes")])
def test_an_option_out_of_range_is_refused_with_its_value(option, value):
    with pytest.raises(QatError, match=f"{option}.*{value}"):
        TwinSoftmax(**{"bits": 4, option: value})
