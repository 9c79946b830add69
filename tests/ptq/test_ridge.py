"""The ridge step: its equation written out, and the error of a layer that reads a quantized input."""

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.moments import Moments
from qat.ptq.ridge import held_out, ridge, ridge_of_halves


def layer(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs (n, 6) with a mean, what a coarse quantizer makes of them, and a weight (4, 6)."""
    generator = torch.Generator().manual_seed(seed)
    mix, weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(7)), torch.randn(4, 6, generator=generator)
    x = torch.randn(n, 6, generator=generator) @ mix + 2
    return x, ((x / 2).floor() * 2).clamp(-4, 8), weight  # rounding down leaves a mean error


def moments_of(q: Tensor, x: Tensor) -> Moments:
    found = Moments(q.shape[1])
    found.update(q, x)
    return found


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_it_solves_the_equation_of_erq_with_an_undamped_bias(damping):
    x, q, weight = layer()
    d_weight, d_bias = ridge(moments_of(q, x), weight, damping)
    A, bias = torch.cat([q, torch.ones(len(q), 1)], 1).double(), torch.randn(4).double()
    target = x.double() @ weight.double().T + bias
    before = A @ torch.cat([weight.double(), bias[:, None]], 1).T
    level = damping * q.double().square().sum(0).mean()
    damp = level * torch.diag(torch.tensor([1.0] * 6 + [0.0]).double())
    expected = torch.linalg.inv(A.T @ A + damp) @ A.T @ (target - before)
    torch.testing.assert_close(d_weight, expected[:-1].T.float(), rtol=1e-5, atol=1e-6)  # the result is float32
    torch.testing.assert_close(d_bias, expected[-1].float(), rtol=1e-5, atol=1e-6)
    error = target - before - A @ torch.cat([d_weight, d_bias[:, None]], 1).double().T
    assert error.mean(0).abs().max() <= 1e-5 * target.abs().max()


def test_a_single_input_by_hand():
    q, x = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])  # x = 2 q + 1
    d_weight, d_bias = ridge(moments_of(q, x), torch.tensor([[3.0]]), 1e-12)
    assert d_weight.item() == pytest.approx(3)  # 3 x = 6 q + 3
    assert d_bias.item() == pytest.approx(3)
    # Centred, q has the variance 2 and the product 2 with x - q; l = 0.5 * 4.
    d_weight, d_bias = ridge(moments_of(q, x), torch.tensor([[3.0]]), 0.5)
    assert d_weight.item() == pytest.approx(3 * 2 / (2 + 2))
    assert d_bias.item() == pytest.approx(3 * 2 - 1.5)  # mean of x - q is 2, that of q is 1


def test_rows_that_it_has_not_seen_have_less_error():
    x, q, weight = layer()
    d_weight, d_bias = ridge(moments_of(q, x), weight, 0.01)
    other, other_q, _ = layer(seed=1)
    target = other @ weight.T
    before = (other_q @ weight.T - target).square().mean()
    after = (other_q @ (weight + d_weight).T + d_bias - target).square().mean()
    assert after < 0.5 * before


def test_unseen_rows_are_judged_by_their_moments():
    x, q, weight = layer()
    other, other_q, _ = layer(n=50, seed=1)
    d_weight, d_bias = ridge(moments_of(q, x), weight, 0.01)
    before = (other_q @ weight.T - other @ weight.T).square().sum()
    after = (other_q @ (weight + d_weight).T + d_bias - other @ weight.T).square().sum()
    change = held_out(moments_of(q, x), moments_of(other_q, other), weight, 0.01)
    assert change == pytest.approx(float(after - before), rel=1e-4)  # sums of float32


def test_halves_choose_the_damping():
    x, q, weight = layer()
    halves = moments_of(q[:200], x[:200]), moments_of(q[200:], x[200:])
    found, expected = ridge_of_halves(halves, weight, (1e-3, 30.0)), ridge(moments_of(q, x), weight, 1e-3)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    opposite = moments_of(q, x), moments_of(q, 2 * q - x)  # what one half teaches is wrong for the other
    d_weight, d_bias = ridge_of_halves(opposite, weight)
    assert torch.equal(d_weight, torch.zeros_like(weight))
    assert torch.equal(d_bias, torch.zeros(4))


def test_nothing_to_correct_changes_nothing_and_dead_inputs_are_left_alone():
    x, q, weight = layer()
    assert not ridge(moments_of(x, x), weight, 0.01)[0].any()
    q[:, 2] = 0
    assert not ridge(moments_of(q, x), weight, 0.01)[0][:, 2].any()
    d_weight, d_bias = ridge(moments_of(torch.zeros_like(x), x), weight, 0.01)
    assert not d_weight.any()
    torch.testing.assert_close(d_bias, (x @ weight.T).mean(0))


def test_no_rows_are_no_evidence_and_infinite_ones_are_refused():
    with pytest.raises(QatError, match="no samples"):
        ridge(Moments(6), torch.ones(4, 6), 0.01)
    x, q, weight = layer()
    x[3, 2] = torch.inf  # the quantizer has clipped it
    with pytest.raises(QatError, match="its inputs are not finite"):
        ridge(moments_of(q, x), weight, 0.01)
