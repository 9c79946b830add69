"""TwinGelu against worked numbers and integer products. Shapes: N tokens, D width, G groups."""

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import TwinGelu, TwinGeluQuantizer
from qat.quantizers.layout import Layout

WHOLE = Layout(axis=0, groups=1, batched=True)
DEPTH = 0.16997124703522
WORKED = [  # 8 bits, negative step 0.17 / 128, m = 4: sign, magnitude, value
    (-0.1699, 0, 127, -0.168671875), (-0.1, 0, 75, -0.099609375), (-0.02, 0, 15, -0.019921875), (-0.0005, 0, 0, 0.0),
    (0.01, 1, 0, 0.0), (0.5, 1, 24, 0.51), (1.3, 1, 61, 1.29625), (2.6, 1, 122, 2.5925),
]  # fmt: skip
RELEASED = [
    (-0.15865525, -0.15802014), (-0.16997051, -0.16997124), (-0.04601722, -0.04647651), (0.02599694, 0.03137255),
    (0.53062544, 0.53333333), (3.89981242, 3.89019608), (4.99999857, 3.98431373),
]  # fmt: skip


def twin(bits: int, step: float, negative: float, ratio: str = "power") -> TwinGeluQuantizer:
    quantizer = TwinGelu(bits, ratio=ratio).build(WHOLE)
    quantizer.set_({"step": torch.tensor([step]), "negative": torch.tensor([negative])})
    return quantizer


def gelu(*shape: int) -> Tensor:
    return torch.nn.functional.gelu(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2)


def test_the_worked_table():
    quantizer, x = twin(8, 0.02125, 0.17 / 128), torch.tensor([row[0] for row in WORKED])
    codes = quantizer.encode(x).int()
    assert codes.tolist() == [128 * sign + magnitude for _, sign, magnitude, _ in WORKED]
    # a step and a product are rounded to float32
    torch.testing.assert_close(quantizer(x), torch.tensor([row[3] for row in WORKED]), rtol=2e-7, atol=0)


def test_the_worked_table_of_the_released_form():
    quantizer = twin(8, 4 / 127.5, DEPTH / 128, "free")
    found = quantizer(torch.tensor([row[0] for row in RELEASED]))
    torch.testing.assert_close(found, torch.tensor([row[1] for row in RELEASED]), rtol=0, atol=3e-7)  # float32 below 4
    quantizer.set_range_(torch.tensor([-0.17]), torch.tensor([4.0]))
    assert quantizer.step.item() == pytest.approx(4 / 127.5)
    assert quantizer.negative.item() == pytest.approx(DEPTH / 128)


def test_every_code_is_unpacked_into_sign_and_magnitude():
    power, free = twin(3, 0.4, 0.1), twin(3, 0.5, 0.1, "free")
    assert power.signed_magnitudes(torch.arange(8)).tolist() == [0, -1, -2, -3, 0, 1, 2, 3]
    assert free.signed_magnitudes(torch.arange(8)).tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    for quantizer in (power, free):
        again = quantizer.encode(quantizer.decode(torch.arange(8))).tolist()
        assert again[1:] == list(range(1, 8))
        assert again[0] == (4 if quantizer is power else 0)  # of two zeros the positive one


@pytest.mark.parametrize(("bits", "m"), [(8, 4), (6, 0), (4, 3), (3, 5)])
def test_two_integer_products_aligned_by_a_shift_are_the_product(bits, m):
    x, w = gelu(50, 96), torch.randint(-128, 128, (96, 16), generator=torch.Generator().manual_seed(1))
    for negative, rtol in ((2.0 ** -(bits + 1), 0), (DEPTH / 2 ** (bits - 1), 1e-5)):  # values are rounded to float32
        quantizer = twin(bits, negative * 2**m, negative)
        signed = quantizer.signed_magnitudes(quantizer.encode(x))  # (N, D)
        summed = signed.clamp(max=0) @ w + (signed.clamp(min=0) @ w << m)
        expected = quantizer(x).detach().double() @ w.double()  # below 2**53: exact
        torch.testing.assert_close(summed * quantizer.negative.double(), expected, rtol=rtol, atol=rtol)


def test_a_power_is_enforced_whatever_is_set_or_learned():
    quantizer = twin(4, 0.37, 0.05)  # 7.4 negative steps: nearest is 2**3
    assert quantizer.step.item() == pytest.approx(0.4)
    torch.nn.init.constant_(quantizer.step, 0.25)  # 2**2.3
    quantizer.project_()
    assert quantizer.step.item() == pytest.approx(0.2)
    for lost, m in ((-1.0, 0), (0.0, 0), (1e9, 19)):
        torch.nn.init.constant_(quantizer.step, lost)
        quantizer.project_()
        assert int(quantizer.exponents) == m
    free = twin(4, 0.37, 0.05, "free")
    free.project_()
    assert free.step.item() == pytest.approx(0.37)


def test_a_range_gives_the_smallest_power_that_covers_it():
    quantizer = TwinGelu(4).build(Layout(0, 4, batched=False))
    negative = DEPTH / 8
    tops = torch.tensor([7.5, 7.6, 30.0, 0.1]) * negative  # half a step above the last value, which is the seventh
    quantizer.set_range_(torch.zeros(4), tops)
    assert quantizer.exponents.tolist() == [0, 1, 2, 0]
    space = quantizer.search_space(torch.rand(4, 10))
    table = space.parameters(space.first)
    assert table["step"].tolist() == [[pytest.approx(negative * 2**m)] * 4 for m in range(20)]
    assert space.near(space.first) is None
    assert TwinGelu(4, ratio="free").build(WHOLE).search_space(torch.rand(1, 10)) is None  # ranges are all


@pytest.mark.parametrize(("ratio", "last"), [("power", 7), ("free", 8)])
def test_gradients(ratio, last):
    quantizer = twin(4, 0.5, 0.0625, ratio)
    x = torch.tensor([4.0, 3.5, 1.1, 0.0, -0.1, -0.0625 * 7, -0.0625 * 8, -1.0], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7 if last == 8 else 0, 0]
    assert quantizer.step.grad.item() == 1 * 7 + 2 * 7 + 3 * 2


def test_what_is_not_a_number_stays_so():
    for ratio in ("power", "free"):
        quantizer = twin(4, 0.5, 0.0625, ratio)
        found = quantizer(torch.tensor([torch.nan, torch.inf, -torch.inf])).tolist()
        assert found[0] != found[0]
        assert found[1:] == [3.5, -0.0625 * quantizer.spec.last]
        assert TwinGelu(4, ratio=ratio).build(WHOLE)(torch.rand(3)).isnan().all()  # not calibrated


@pytest.mark.parametrize(("option", "value"), [("signed", True), ("ratio", "any")])
def test_an_option_out_of_range_is_refused_with_its_value(option, value):
    with pytest.raises(QatError, match=f"{option} is '?{value}"):
        TwinGelu(**{"bits": 4, option: value})
