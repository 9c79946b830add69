"""Ridge regression of a weight on the quantized input: the first step of ERQ (ICML 2024).

The layer should give Y = X W^T + b, the product of the input before its quantizer, although it reads X_q. With
A = [X_q, 1], the change of weight and bias that has the least squared error, damped, is::

    [dW, db]^T = (A^T A + l D)^{-1} A^T (Y - A [W, b]^T) = (A^T A + l D)^{-1} A^T (X - X_q) W^T

so the moments of the input are enough, and the bias cancels. ERQ has D = 1 and damps the bias too. Here D is 0 for the
bias: every row is evidence about it, and the mean error of each output becomes exactly zero.

How much damping a layer needs varies by a factor of 1000. At the input of attn.proj in block 10 of DeiT-T, three
quarters of the variance lie between images, not between the tokens of an image, so that 6,000 rows teach little more
than their 32 images do; the damping that is best for the first layers makes the error of this one three times as large.
`ridge_of_halves` therefore lets each half of the images judge what was learned from the other.
Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.moments import Moments, damped_cholesky, raise_unless_finite

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@torch.no_grad()
def ridge(moments: Moments, weight: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What to add to a weight and a bias so that they make up for the quantizer of the input.

    Args:
        moments: of the quantized input and its reference.
        weight: (O, I), not quantized.
        damping: l, as a share of the mean squared norm of an input.

    Returns:
        Change of the weight (O, I) and of the bias (O,), in the dtype of the weight.

    Raises:
        QatError: there are no rows, or their moments are not finite or cannot be inverted.
    """
    if not moments.rows:
        raise QatError("no samples: no input of this layer was seen; calibrate on images that reach it")
    raise_unless_finite(moments.cross)
    factor = damped_cholesky(moments.gram, damping, inputs=weight.shape[1])
    change = torch.cholesky_solve(moments.cross @ weight.double().T, factor)  # (I + 1, O)
    return change[:-1].T.to(weight.dtype), change[-1].to(weight.dtype)


@torch.no_grad()
def ridge_of_halves(
    halves: tuple[Moments, Moments], weight: Tensor, dampings: Sequence[float] = DAMPINGS
) -> tuple[Tensor, Tensor]:
    """As `ridge` with all rows, with the damping that serves unseen images best; zeros where none of them helps.

    Args:
        halves: moments of two halves of the images. All rows of an image belong to one of them.
        weight: (O, I), not quantized.
        dampings: what to choose from.

    Returns:
        Change of the weight (O, I) and of the bias (O,), in the dtype of the weight.

    Raises:
        QatError: one half has no rows, or its moments are not finite or cannot be inverted.
    """
    first, second = halves
    if not (first.rows and second.rows):
        raise QatError(
            "Ridge compares two halves of the images, and one has none: raise calibration.images to 2 or more, or give "
            "Ridge a damping"
        )
    core = torch.linalg.qr(weight.double(), mode="r").R  # (O or I, I): rotated outputs have the same sum of squares
    changes = {
        damping: held_out(first, second, core, damping) + held_out(second, first, core, damping) for damping in dampings
    }
    best = min(changes, key=lambda damping: changes[damping])
    if changes[best] < 0:
        return ridge(first + second, weight, best)
    return torch.zeros_like(weight), weight.new_zeros(len(weight))


@torch.no_grad()
def held_out(seen: Moments, unseen: Moments, weight: Tensor, damping: float) -> float:
    """What `ridge` with the moments ``seen`` adds to the sum of squared errors of the unseen rows; negative is good.

    With D = [dW, db]^T it is tr(D^T A^T A D) - 2 tr(D^T A^T (X - X_q) W^T), so the rows are not needed.
    """
    d_weight, d_bias = ridge(seen, weight, damping)
    D = torch.cat([d_weight, d_bias[:, None]], 1).double().T  # (I + 1, O)
    return float((D * (unseen.gram @ D - 2 * (unseen.cross @ weight.double().T))).sum())
