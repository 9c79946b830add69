"""A factor and a constant per channel, from streamed moments."""

import pytest
import torch

from qat.errors import QatError
from qat.ptq.affine_fit import LEAST_FACTOR, MOST_FACTOR, OutputMoments, affine_fit, bias_fit
from qat.ptq.moments import Moments


def moments(output: torch.Tensor, target: torch.Tensor) -> OutputMoments:
    y, t = output.double(), target.double()
    return OutputMoments(torch.stack([x.sum(0) for x in (y, t, y * y, y * t)]), len(y))


def test_three_rows_by_hand():
    found = moments(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [2.0], [4.0]]))
    assert bias_fit(found).item() == pytest.approx(7 / 3 - 1)
    a, c = affine_fit(found, 0.0)
    assert a.item() == pytest.approx(1.5)  # variance 2/3, covariance 1
    assert c.item() == pytest.approx(7 / 3 - 1.5)
    a, c = affine_fit(found, 0.25)
    assert a.item() == pytest.approx(1.4)  # 1 + 0.5 / 1.25
    assert c.item() == pytest.approx(7 / 3 - 1.4)


def test_it_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(200, 5, generator=generator) * torch.arange(1, 6) + 100
    output = 0.9 * y + torch.randn(200, 5, generator=generator) - 3
    a, c = affine_fit(moments(output, y), 0.0)
    for i in range(5):
        A = torch.stack([output[:, i], torch.ones(200)], 1).double()
        expected = torch.linalg.lstsq(A, y[:, i].double()).solution
        assert (a[i].item(), c[i].item()) == pytest.approx(expected.tolist(), rel=1e-5)  # the result is float32
    error = y - (a * output + c)
    assert (error.square().mean(0) < (y - output - bias_fit(moments(output, y))).square().mean(0)).all()
    assert error.mean(0).abs().max() < 1e-4  # of values of 100


def test_a_constant_channel_gets_a_constant_and_factors_stay_in_their_interval():
    output = torch.tensor([[0.1, 0.0, 1.0, 1.0], [0.1, 0.0, 2.0, 2.0], [0.1, 0.0, 3.0, 3.0]])
    target = torch.tensor([[1.0, 5.0, 9.0, -1.0], [2.0, 5.0, 19.0, -2.0], [3.0, 5.0, 29.0, -3.0]])
    found = moments(output, target)
    a, c = affine_fit(found, 0.0)
    assert a.tolist() == [1, 1, MOST_FACTOR, LEAST_FACTOR]
    assert c.tolist() == pytest.approx([1.9, 5, 19 - 2 * MOST_FACTOR, -2 - 2 * LEAST_FACTOR])
    assert bias_fit(found).tolist() == pytest.approx([1.9, 5, 17, -4])


def test_no_rows_and_values_that_are_not_finite_are_refused():
    with pytest.raises(QatError, match="no samples"):
        bias_fit(OutputMoments(torch.zeros(4, 2), 0))
    with pytest.raises(QatError, match="not finite"):
        affine_fit(moments(torch.tensor([[torch.inf]]), torch.ones(1, 1)), 0.0)


def test_moments_of_a_layer_are_those_of_its_rows():
    generator = torch.Generator().manual_seed(0)
    quantized, reference = (torch.randn(40, 3, generator=generator) + 1 for _ in range(2))
    (W, b), (V, c) = ((torch.randn(2, 3, generator=generator), torch.randn(2, generator=generator)) for _ in range(2))
    inputs = Moments(3)
    inputs.update(quantized, reference)
    found = OutputMoments.of_layer(inputs, (W, b), (V, c))
    expected = moments(quantized.double() @ W.double().T + b, reference.double() @ V.double().T + c)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-10, atol=1e-10)
    assert found.rows == 40
