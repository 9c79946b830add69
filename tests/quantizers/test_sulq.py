"""SULQ: values by hand, what a shift does to zero, and its gradient."""

import math

import pytest
import torch

from qat.errors import QatError
from qat.quantizers import SULQ, Layout, SULQQuantizer


def quantizer(low: float, step: float, eta: float, bits: int = 3) -> SULQQuantizer:
    found = SULQ(bits).build(Layout(0, 1, batched=True))
    found.set_({"low": torch.tensor([low]), "step": torch.tensor([step]), "eta": torch.tensor([eta])})
    return found


def test_values_by_hand():
    """Exponents 0, 0.9, 1.8 ... 6.3 are rounded to 0, 1, 2, 3, 4, 4, 5, 6: 0.9 * 5 = 4.5 goes to the even one."""
    q = quantizer(low=0, step=0.9, eta=0.01)
    values = q.decode(torch.arange(8))
    torch.testing.assert_close(values, torch.tensor([2.0**-e for e in (0, 1, 2, 3, 4, 4, 5, 6)]) - 0.01)
    assert q.encode(torch.tensor([1.0, 0.52, 0.0])).tolist() == [0, 1, 7], "y is -0.01, 0.92 and 6.64"


def test_small_probabilities_become_slightly_negative():
    q = quantizer(low=0, step=1, eta=0.01)
    assert float(q(torch.tensor([0.001]))) == pytest.approx(2**-7 - 0.01), "-log2(0.011) = 6.5, the last code is 7"


def test_the_gradient_is_that_of_rounding_through():
    x = torch.tensor([0.9, 0.3, 0.05, 0.0], requires_grad=True)
    q = quantizer(low=0, step=1, eta=0.01, bits=2)  # y up to 3: x down to 0.115
    out = q(x)
    out.sum().backward()
    assert x.grad is not None
    slopes = (out.detach() + 0.01) / (x.detach() + 0.01)
    torch.testing.assert_close(x.grad[:2], slopes[:2])
    assert q.step.grad is not None
    codes = q.encode(x.detach())
    torch.testing.assert_close(q.step.grad, (-math.log(2) * (out.detach() + 0.01) * codes).sum()[None])
    assert x.grad[2:].tolist() == [0, 0]


def test_all_levels_serve_attention_of_a_wide_range():
    """A softmax has most exponents between 1 and 20: the plain log2 grid of 8 codes ends at 2**-7."""
    rows = torch.softmax(3 * torch.randn(64, 197, generator=torch.Generator().manual_seed(0)), -1).view(1, -1)
    found = SULQ(3).build(Layout(0, 1, batched=True))
    found.init_from(rows)
    assert set(found.encode(rows).unique().tolist()) == set(range(8))


def test_codes_have_no_sign():
    with pytest.raises(QatError, match="signed is True"):
        SULQ(4, signed=True)
