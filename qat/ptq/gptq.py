"""Rounds a weight column by column and lets later columns make up for earlier ones: GPTQ and GPTAQ.

GPTQ (arXiv 2210.17323) minimizes |W X - Q X|, GPTAQ (arXiv 2504.02692) minimizes |W X_fp - Q X_q|. With
H = X_q X_q^T, damped, and H^{-1} = U^T U, column i in turn::

    q = nearest(w_i),    e = (w_i - q) / U_ii,    w_j += -e U_ij + w_i P_ij  for j > i

The trailing block of H has the inverse U_{>i}^T U_{>i}. So -e U_i is the best answer of the columns that are left to
the error of column i, and P_i = D_{i,>i} U_{>i}^T U_{>i}, with D = (X_fp - X_q) X_q^T, is their best answer to what the
target loses because column i reads X_q: P = alpha * strictly_upper(D U^T) U. GPTQ has P = 0.

GPTAQ answers drift that inputs share. It leaves out the diagonal of D, which is most of what a quantizer right before
the layer adds; `qat.ptq.ridge` before GPTQ answers all of D.
Shapes: O outputs, I inputs, B columns of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.ptq.moments import damped_cholesky, raise_unless_finite
from qat.quantizers.layout import Affine, Layout

BLOCK = 64  # columns; those behind a block are changed once, by a product of matrices
ALPHA = 0.25  # as in the code of GPTAQ


class Grid(NamedTuple):
    """The values that each entry of a weight may have: (code - zero_point) * step, with codes from qmin to qmax."""

    step: Tensor  # (O, I), a view of fewer values
    zero_point: Tensor  # (O, I), a view
    qmin: int
    qmax: int

    @classmethod
    def of(cls, affine: Affine, weight: Tensor) -> Grid:
        """The grid of a quantizer of ``weight`` (O, I)."""
        layout = Layout(affine.axis or 0, len(affine.scale), batched=False)
        step, zero = (layout.view(x.detach(), weight).expand_as(weight) for x in (affine.scale, affine.zero_point))
        return cls(step, zero, affine.qmin, affine.qmax)

    def rounded(self, values: Tensor, i: int) -> Tensor:
        """The nearest values of the grid for column ``i`` (O,), computed as the quantizer does it."""
        step, zero = self.step[:, i], self.zero_point[:, i]
        return (values / step).clamp_(self.qmin - zero, self.qmax - zero).round_() * step


@torch.no_grad()
def gptq(
    weight: Tensor, grid: Grid, gram: Tensor, damping: float, cross: Tensor | None = None, alpha: float = ALPHA
) -> Tensor:
    """Values of the grid whose product with the input is close to that of the weight.

    Inputs are taken from the largest to the smallest. An input that is always zero has no part in any error: its
    weights are rounded to the nearest value.

    Args:
        weight: (O, I).
        grid: of the quantizer of this weight.
        gram: X_q X_q^T (I, I), float64: ``Moments.inputs_gram``.
        damping: what is added to the diagonal of ``gram``, as a share of its mean.
        cross: X_q (X_fp - X_q)^T (I, I), rows for X_q: ``Moments.inputs_cross``; None for GPTQ.
        alpha: share of the answer to ``cross``, 0 to 1.

    Returns:
        (O, I), in the dtype of the weight, which the quantizer leaves as they are, bit for bit.

    Raises:
        QatError: moments are not finite, or ``gram`` cannot be made positive definite.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(gram[order][:, order], damping)
    answers = torch.zeros_like(upper)
    if cross is not None:
        raise_unless_finite(cross)
        answers = alpha * _answers(cross[order][:, order], upper)
    left = weight.double().T[order]  # (I, O): a column of the weight is a row here, and lies together
    values, columns = torch.empty_like(left), order.tolist()
    for start in range(0, len(left), BLOCK):
        block, rest = slice(start, start + BLOCK), slice(start + BLOCK, None)
        values[block], errors = _round_block(
            left[block], upper[block, block], answers[block, block], grid, columns[block]
        )
        left[rest].addmm_(upper[block, rest].T, errors, alpha=-1)
        left[rest].addmm_(answers[block, rest].T, left[block])
    return values[order.argsort()].T.to(weight.dtype)


def _round_block(left: Tensor, upper: Tensor, answers: Tensor, grid: Grid, columns: list[int]) -> tuple[Tensor, Tensor]:
    """Round B columns in turn; ``left`` becomes what each of them was when its turn came.

    Args:
        left: what is left of the weight in these columns (B, O).
        upper, answers: U and P between them (B, B).
        grid: of the weight.
        columns: their places in the weight.

    Returns:
        Values of the grid and errors e, both (B, O).
    """
    values, errors = torch.empty_like(left), torch.empty_like(left)
    for k, column in enumerate(columns):
        left[k] += answers[:k, k] @ left[:k] - upper[:k, k] @ errors[:k]
        values[k] = grid.rounded(left[k].float(), column)
        errors[k] = (left[k] - values[k]) / upper[k, k]
    return values, errors


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U, upper, with (gram + damping)^{-1} = U^T U: the inverse of R in gram = R R^T, upper too."""
    R = damped_cholesky(gram.flip(0, 1), damping).flip(0, 1)
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    upper: Tensor = torch.linalg.solve_triangular(R, eye, upper=True)
    return upper


def _answers(cross: Tensor, upper: Tensor) -> Tensor:
    """P of alpha 1, from X_q (X_fp - X_q)^T (I, I)."""
    return (upper @ cross).T.triu(1) @ upper
