"""Steps that are learned as logarithms."""

import pytest
import torch

from qat.errors import QatError
from qat.quantizers import LSQ, Layout, Quantizer, Uniform
from qat.quantizers.quantizer import MIN_STEP

SPECS = [LSQ(4), Uniform(4)]


def pair(spec: LSQ | Uniform) -> tuple[Quantizer, Quantizer]:
    """The plain quantizer and the other one, with the same values."""
    kind, layout = type(spec), Layout(0, 3, batched=False)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    plain, other = spec.build(layout), kind(4, log_step=True).build(layout)
    for quantizer in (plain, other):
        quantizer.set_range_(x.amin(1), x.amax(1))
    return plain, other


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_gradient_is_that_of_the_step_times_the_step(spec):
    """The tolerance is that of exp(log(step)) in float32."""
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    plain, other = pair(spec)
    torch.testing.assert_close(other.step, plain.step)
    for quantizer in (plain, other):
        (quantizer(x) * x).sum().backward()
    torch.testing.assert_close(other.log_step.grad, plain.step.grad * plain.step.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_step_of_adam_moves_every_step_by_the_same_part(spec):
    x = torch.randn(3, 50) * torch.tensor([[0.001], [1.0], [1000.0]])
    quantizer = type(spec)(4, log_step=True, granularity="channel").build(Layout(0, 3, batched=False))
    quantizer.set_range_(x.amin(1), x.amax(1))
    before = quantizer.step.detach().clone()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    (quantizer(x) * torch.randn(3, 50)).sum().backward()
    optimizer.step()
    torch.testing.assert_close((quantizer.step / before).log().abs(), torch.full((3,), 0.01), rtol=1e-2, atol=0)


def test_there_is_no_step_below_the_limit():
    _, quantizer = pair(LSQ(4))
    with torch.no_grad():
        quantizer.log_step.fill_(-100)
    quantizer.project_()
    torch.testing.assert_close(quantizer.step.detach(), torch.full((3,), MIN_STEP))
    quantizer.set_({"step": torch.zeros(3)})
    assert bool(quantizer.log_step.isfinite().all())
    assert quantizer.illegal("here", {"log_step": quantizer.log_step.detach()}) == ""
    for value in (float("nan"), float("-inf"), 1000.0):
        wrong = quantizer.illegal("here", {"log_step": torch.tensor([0.0, value])})
        assert f"a log_step of 'here' is {value:g}; logarithms of steps lie from -" in wrong


def test_a_fractional_zero_point_is_refused():
    with pytest.raises(QatError, match="log_step is not there for zero: fractional"):
        Uniform(4, zero="fractional", log_step=True)
