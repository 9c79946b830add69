"""DFQ: the worked example of its paper's reading, and gradients by both ends against differences of a soft grid."""

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import DFQ, DFQQuantizer, Layout

P = [0.001, 0.02, 0.049, 0.05, 0.12, 0.30, 0.45, 0.80]


def quantizer(zero: bool = False, low: float = 0.05, high: float = 0.6, bits: int = 3) -> DFQQuantizer:
    found = DFQ(bits, zero=zero).build(Layout(0, 1, batched=True))
    found.set_({"low": torch.tensor([low]), "high": torch.tensor([high])})
    return found


def test_values_of_the_worked_example():
    """The tolerance is that of six printed digits."""
    x, q = torch.tensor(P), quantizer()
    assert q.encode(x).tolist() == [0, 0, 0, 0, 1, 3, 5, 7]
    values = torch.tensor([0.05, 0.05, 0.05, 0.05, 0.128571, 0.285714, 0.442857, 0.6])
    torch.testing.assert_close(q(x).detach(), values, atol=1e-6, rtol=0)
    assert float(q(x).sum()) == pytest.approx(1.657143, abs=1e-6)
    assert float((q(x) - x).square().mean()) == pytest.approx(0.005453821, abs=1e-8)


def test_values_below_the_interval_can_become_zero():
    x, q = torch.tensor(P), quantizer(zero=True)
    assert q.encode(x).tolist() == [0, 0, 0, 1, 2, 4, 5, 7]
    values = torch.tensor([0, 0, 0, 0.05, 0.141667, 0.325, 0.416667, 0.6])
    torch.testing.assert_close(q(x).detach(), values, atol=1e-6, rtol=0)
    assert float((q(x) - x).square().mean()) == pytest.approx(0.005625944, abs=1e-8)


def gradients(q: DFQQuantizer, upstream: Tensor) -> tuple[Tensor, float, float]:
    x = torch.tensor(P, requires_grad=True)
    (q(x) * upstream).sum().backward()
    assert x.grad is not None
    assert q.low.grad is not None
    assert q.high.grad is not None
    return x.grad, float(q.low.grad), float(q.high.grad)


def test_gradients_of_the_worked_example():
    d_x, d_low, d_high = gradients(quantizer(), torch.ones(8))
    assert d_x.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert (d_low, d_high) == (pytest.approx(3.023377, abs=1e-5), pytest.approx(0.976623, abs=1e-5))
    assert d_low + d_high == pytest.approx(4, abs=1e-5), "as many as are clipped"


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("i", range(8))
def test_gradients_by_both_ends_value_by_value(i, zero):
    """With the codes held, and the rounding error held, the value is linear in both ends: differences are exact."""
    q, one = quantizer(zero), torch.zeros(8)
    one[i] = 1
    d_x, d_low, d_high = gradients(q, one)
    x, steps = P[i], q.spec.steps
    u = (x - 0.05) / (0.55 / steps)
    if x < 0.05:
        expected = (0.0, 0.0) if zero else (1.0, 0.0)
    elif x > 0.6:
        expected = (0.0, 1.0)
    else:
        r = round(u) - u
        expected = (-r / steps, r / steps)
    assert (d_low, d_high) == (pytest.approx(expected[0], abs=1e-5), pytest.approx(expected[1], abs=1e-5))
    assert float(d_x[i]) == float(0.05 <= x <= 0.6)


def test_an_interval_stays_one_of_probabilities():
    q = quantizer(low=-0.2, high=1.3)
    q.project_()
    assert (float(q.low), float(q.high)) == (0, 1)
    q.set_({"low": torch.tensor([0.7]), "high": torch.tensor([0.2])})
    q.project_()
    assert float(q.high) == pytest.approx(0.2)
    assert float(q.low) == pytest.approx(0.199)


def test_the_start_is_better_than_the_whole_range():
    rows = torch.softmax(3 * torch.randn(64, 197, generator=torch.Generator().manual_seed(0)), -1).view(1, -1)
    found = DFQ(3).build(Layout(0, 1, batched=True))
    found.init_from(rows)
    whole = quantizer(low=0, high=float(rows.max()))
    assert float((found(rows) - rows).square().mean()) < float((whole(rows) - rows).square().mean())


def test_codes_have_no_sign():
    with pytest.raises(QatError, match="signed is True"):
        DFQ(4, signed=True)
