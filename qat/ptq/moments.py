"""Second moments of the input of a linear layer: all that a correction of its weight has to know about the images.

With A = [X_q, 1], the input as the layer reads it beside a column of ones for its bias, and X, the input that it should
have read (that before its quantizer, or that of the float model)::

    gram = A^T A,    cross = A^T (X - X_q)

Products and sums are float64: the mean of an input may be far larger than what varies in it, and float32 products take
half the time at best. Shapes: I inputs, n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import QatError

BLOCK = 4096  # rows that are float64 at a time
LEAST_DAMPING, MOST_DAMPING = 1e-8, 10.0  # of those that are tried when a matrix is not positive definite


class Moments:
    """Moments of a stream of rows; what it holds does not grow with their number.

    Args:
        inputs: I.
        device: where the moments lie, and the rows too.

    Attributes:
        gram: A^T A (I + 1, I + 1); the last row and column belong to the bias.
        cross: A^T (X - X_q) (I + 1, I).
        rows: n.
    """

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs + 1, inputs, dtype=torch.float64, device=device)
        self.rows = 0

    @torch.no_grad()
    def update(self, quantized: Tensor, reference: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Take in a batch of rows.

        Args:
            quantized: what the layer reads (n, I).
            reference: what it should have read in the same rows (n, I); None where that does not differ.
            weights: how much each row counts (n,); None for 1.
        """
        I = self.cross.shape[1]  # noqa: E741
        for start in range(0, len(quantized), BLOCK):
            rows = quantized[start : start + BLOCK]
            A = rows.new_ones(len(rows), I + 1, dtype=torch.float64)
            A[:, :I] = rows
            B = A if weights is None else A * weights[start : start + BLOCK, None].double()
            self.gram.addmm_(B.T, A)
            if reference is not None:
                self.cross.addmm_(B.T, reference[start : start + BLOCK].double() - A[:, :I])
        self.rows += len(quantized)

    def __add__(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        both = Moments(self.cross.shape[1], self.gram.device)
        both.gram, both.cross, both.rows = self.gram + other.gram, self.cross + other.cross, self.rows + other.rows
        return both

    @property
    def inputs_gram(self) -> Tensor:
        """X_q^T X_q (I, I)."""
        return self.gram[:-1, :-1]

    @property
    def inputs_cross(self) -> Tensor:
        """X_q^T (X - X_q) (I, I)."""
        return self.cross[:-1]


def raise_unless_finite(moments: Tensor) -> None:
    """Raise QatError for moments of inputs that are infinite or NaN."""
    if not moments.isfinite().all():
        raise QatError("its inputs are not finite: look at the weights of the model and at the images")


def damped_cholesky(gram: Tensor, damping: float, inputs: int | None = None) -> Tensor:
    """The lower Cholesky factor of a matrix of moments with more on its diagonal.

    A matrix that is not positive definite is tried again with ten times the damping.

    Args:
        gram: symmetric (N, N), float64.
        damping: what is added, as a share of the mean of the diagonal.
        inputs: the leading entries of the diagonal that are averaged and added to; None for all.

    Raises:
        QatError: values are not finite, or no damping up to `MOST_DAMPING` suffices.
    """
    raise_unless_finite(gram)
    diagonal = gram.diagonal()[:inputs]
    mean = float(diagonal.mean()) or 1.0  # every input is zero
    factor: Tensor
    tried = damping
    while tried <= max(damping, MOST_DAMPING):
        damped = gram.clone()
        damped.diagonal()[:inputs].add_(tried * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        tried = max(10 * tried, LEAST_DAMPING)
    raise QatError(
        f"moments of the inputs are not positive definite, even with a damping of {tried / 10:g}: give more images"
    )
