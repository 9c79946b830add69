"""Power-of-two factors against numbers worked out by hand. T tokens, C channels."""

import pytest
import torch

from qat.errors import QatError
from qat.quantizers import PTF, PTFQuantizer
from qat.quantizers.spec import Layout

X = torch.tensor(
    [
        [0.113, -1.43, 2.71, 5.21, -3.11],
        [-0.207, 1.57, -1.93, -4.87, 7.93],
        [0.061, 0.81, 0.37, 0.63, 12.77],
        [0.158, -0.69, -2.77, 3.39, -12.73],
    ]
)  # (T, C)
CODES = [[136, 13, 235, 231, 96], [110, 253, 50, 30, 206], [132, 192, 142, 140, 255], [140, 72, 16, 195, 0]]
INTEGERS = [[9, -114, 216, 416, -248], [-17, 126, -154, -388, 632], [5, 65, 30, 52, 1024], [13, -55, -222, 272, -1016]]


def ptf(channels: int = 5, **options) -> PTFQuantizer:
    return PTF(**{"bits": 8, **options}).build(Layout(-1, channels, batched=True))


@pytest.fixture
def example() -> PTFQuantizer:
    quantizer = ptf()
    quantizer.init_from(X.T)
    return quantizer


def filled(step: float, zero_point: int, shift: list[int], **options) -> PTFQuantizer:
    quantizer = ptf(len(shift), **options)
    with torch.no_grad():
        quantizer.step.fill_(step)
        quantizer.zero_point.fill_(zero_point)
        quantizer.shift.copy_(torch.tensor(shift))
    return quantizer


def test_calibration_of_the_worked_example(example):
    assert example.step.item() == pytest.approx(0.0125, rel=1e-6)
    assert example.zero_point.tolist() == [127]
    assert example.shift.tolist() == [0, 0, 1, 2, 3]


def test_codes_and_integers_of_the_worked_example(example):
    assert example.encode(X).tolist() == CODES
    assert example.integers(X).tolist() == INTEGERS


def test_errors_of_the_worked_example(example):
    mse = (example(X) - X).square().mean(0)
    torch.testing.assert_close(mse, torch.tensor([1.3250e-5, 1.5625e-5, 4.3750e-5, 2.5e-4, 7.0e-4]), rtol=1e-3, atol=0)
    example.shift.zero_()
    assert (example(X) - X).square().mean(0)[2].item() == pytest.approx(0.68693, rel=1e-4)


def test_an_integer_times_the_step_is_the_value(example):
    x = torch.randn(2, 7, 5) * 6
    integers = example.integers(x)
    assert torch.equal(integers * example.step, example(x))
    assert torch.equal((example(x) / example.step).round(), integers)
    assert torch.equal(integers, ((example.encode(x).int() - 127) << example.shift.int()).float())


def test_a_range_gives_every_channel_the_smallest_shift_that_holds_it():
    quantizer = ptf()
    quantizer.set_range_(X.amin(0), X.amax(0))
    assert quantizer.calibrated
    assert quantizer.shift.tolist() == [0, 0, 1, 2, 3]
    quantizer.set_range_(torch.tensor([-12.8, -1.6, -1.7, -1.0, 0.0]), torch.tensor([12.7, 0.0, 0.0, 1.7, 0.001]))
    assert quantizer.step.item() == pytest.approx(0.0125)
    assert quantizer.zero_point.tolist() == [128]
    assert quantizer.shift.tolist() == [3, 0, 1, 1, 0]  # 128 * 0.0125 = 1.6 below zero, 127 * 0.0125 above


def test_of_equal_errors_the_smallest_shift_wins():
    quantizer = filled(0.25, 128, [3, 3, 3])
    quantizer.refine_(torch.tensor([[0.0, 0.0], [2.0, -4.0], [0.25, 2.0]]))  # the second lies on every grid
    assert quantizer.shift.tolist() == [0, 0, 0]


def test_an_outlier_can_cost_less_than_a_coarse_grid():
    quantizer = filled(0.01, 128, [0, 0])
    fine = torch.linspace(-1.0, 1.0, 1000)
    quantizer.refine_(torch.stack([torch.cat([fine, torch.tensor([1.28])]), torch.cat([fine, torch.tensor([9.0])])]))
    assert quantizer.shift.tolist() == [0, 3]


def test_released_ranges_without_zero_lose_their_far_end():
    x = torch.tensor([[2.0, 5.0, 3.0, 4.0]]).T  # (T, 1)
    for zero, values in (("clipped", [2, 3, 3, 3]), ("code", [2, 5, 3, 4])):
        quantizer = ptf(1, zero=zero)
        quantizer.init_from(x.T)
        assert quantizer.zero_point.item() == 0
        torch.testing.assert_close(quantizer(x).flatten(), torch.tensor(values).float(), atol=0.012, rtol=0)


@pytest.mark.parametrize("zero", ["code", "clipped"])
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_a_constant_tensor_is_kept(zero, value):
    quantizer, x = ptf(2, zero=zero), torch.full((3, 2), value)
    quantizer.init_from(x.T)
    assert quantizer.calibrated
    torch.testing.assert_close(quantizer(x), x, atol=1e-5, rtol=0)


def test_the_gradient_of_the_step_counts_the_shift():
    quantizer = filled(0.5, 2, [0, 2], bits=2)
    x = torch.tensor([[0.3, 3.0], [9.0, -1.0]], requires_grad=True)  # v = 0.6, 1.5; 18, -0.5
    out = quantizer(x)
    assert out.tolist() == [[0.5, 2.0], [0.5, 0.0]]  # codes - zero reach from -2 to 1
    out.sum().backward()
    assert x.grad.tolist() == [[1, 0], [0, 1]]
    raw = (1 - 0.6) + 1 + 4 * 1 + 4 * 0.5  # rounded less v inside, the end outside; times 2**shift
    assert quantizer.step.grad.item() == pytest.approx(raw / (2 * 3) ** 0.5)  # 2 values of a sample, qmax 3


def test_a_weight_has_its_channels_in_front():
    quantizer = PTF(8).build(Layout(0, 5, batched=False))
    quantizer.init_from(X.T)
    assert quantizer.encode(X.T).tolist() == torch.tensor(CODES).T.tolist()


@pytest.mark.parametrize("factors", [0, 1, 7])
def test_factors_bound_the_shift(factors):
    quantizer = ptf(factors=factors)
    quantizer.init_from(X.T)
    assert quantizer.shift.max() == min(factors, quantizer.shift.max()) <= factors
    assert quantizer.step.item() == pytest.approx(0.1 / 2**factors, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signed": True}, "signed is True"),
        ({"granularity": "tensor"}, "granularity is 'tensor'"),
        ({"factors": 8}, "factors is 8"),
        ({"factors": 1.0}, "factors is 1.0"),
        ({"factors": True}, "factors is True"),
        ({"zero": "none"}, "zero is 'none'"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(QatError, match=message):
        PTF(8, **options)
