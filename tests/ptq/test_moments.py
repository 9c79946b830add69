"""Second moments of a stream: against the whole matrix, and factors of matrices that have none."""

import pytest
import torch

from qat.errors import QatError
from qat.ptq import moments
from qat.ptq.moments import Moments, damped_cholesky


def test_two_rows_worked_out_by_hand():
    found = Moments(2)
    found.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.5, 2.0], [3.0, -1.0]]))
    assert found.gram.tolist() == [[10, 2, 4], [2, 4, 2], [4, 2, 2]]  # [1, 2, 1] and [3, 0, 1]
    assert found.cross.tolist() == [[0.5, -3], [1, 0], [0.5, -1]]  # differences [.5, 0] and [0, -1]
    assert found.rows == 2
    assert found.inputs_gram.tolist() == [[10, 2], [2, 4]]
    assert found.inputs_cross.tolist() == [[0.5, -3], [1, 0]]


def test_batches_and_blocks_add_up(monkeypatch):
    monkeypatch.setattr(moments, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 5, generator=generator) + 1000  # float32 products would be wrong in the third decimal
    q = x.round()
    whole, parts = Moments(5), Moments(5)
    whole.update(q, x)
    for rows in (slice(0, 20), slice(20, 21)):
        parts.update(q[rows], x[rows])
    rest = Moments(5)
    rest.update(q[21:], x[21:])
    parts += rest
    A = torch.cat([q, torch.ones(50, 1)], 1).double()
    for found in (whole, parts):  # float64 sums in another order
        torch.testing.assert_close(found.gram, A.T @ A, rtol=1e-13, atol=0)
        torch.testing.assert_close(found.cross, A.T @ (x.double() - q), rtol=1e-9, atol=1e-9)
        assert found.rows == 50
    assert whole.gram.dtype == torch.float64


def test_without_a_reference_nothing_differs():
    found = Moments(3)
    found.update(torch.ones(2, 3))
    assert not found.cross.any()


def test_damping_is_a_share_of_the_mean_and_may_leave_out_the_bias():
    gram = torch.diag(torch.tensor([1.0, 3.0, 100.0], dtype=torch.float64))
    assert damped_cholesky(gram, 0.5, inputs=2).diagonal().square().tolist() == pytest.approx([2, 4, 100])
    assert damped_cholesky(gram[:2, :2], 0.5).diagonal().square().tolist() == pytest.approx([2, 4])


def test_a_matrix_that_is_not_positive_definite_gets_more_damping_up_to_a_limit():
    almost = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-6]], dtype=torch.float64)  # eigenvalues 2 and -5e-7
    factor = damped_cholesky(almost, 0.0)
    torch.testing.assert_close(factor @ factor.T, almost, rtol=0, atol=1e-5)  # 1e-6 of the diagonal was enough
    assert damped_cholesky(torch.zeros(2, 2).double(), 0.25).tolist() == [[0.5, 0], [0, 0.5]]
    with pytest.raises(QatError, match="not positive definite, even with a damping of 10: give more images"):
        damped_cholesky(torch.tensor([[1.0, 50.0], [50.0, 1.0]]).double(), 0.01)
    with pytest.raises(QatError, match="not finite"):
        damped_cholesky(torch.full((2, 2), torch.nan).double(), 0.01)
