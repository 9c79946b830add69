"""Fits the output of a quantized layer to its target, channel by channel: a constant, or a factor and a constant.

    y ~ y_q + c,    c = mean(y) - mean(y_q)                                         (bias correction, Nagel et al. 2019)
    y ~ a y_q + c,  a = 1 + (cov(y_q, y) - var(y_q)) / ((1 + d) var(y_q)),  c = mean(y) - a mean(y_q)

The second is least squares with a penalty d var(y_q) (a - 1)^2. Shapes: O outputs, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.moments import Moments, raise_unless_finite

Affines = tuple[Tensor, Tensor]  # weight (O, I), bias (O,)

LEAST_FACTOR, MOST_FACTOR = 0.5, 2.0  # a factor beyond them is the accident of few rows
LEAST_VARIANCE = 1e-10  # of the mean square: what is smaller is a constant channel


@dataclass(frozen=True)
class OutputMoments:
    """First and second moments, float64, of outputs and their targets.

    Args:
        sums: of y_q, y, y_q^2 and y_q y (4, O).
        rows: n, or the sum of what the rows count.
    """

    sums: Tensor
    rows: float

    @classmethod
    def of_layer(cls, moments: Moments, layer: Affines, target: Affines) -> OutputMoments:
        """Those of a layer, from the moments of its input.

        Args:
            moments: of the quantized input, with the input of the target as the reference.
            layer: the weight as it is quantized (O, I), and the bias (O,).
            target: weight and bias that give the target.
        """
        here, there = (torch.cat([weight.double(), bias.double()[:, None]], 1) for weight, bias in (layer, target))
        cross = moments.gram @ there.T + moments.cross @ target[0].double().T  # A^T y (I + 1, O)
        output, square = here @ moments.gram[:, -1], ((here @ moments.gram) * here).sum(1)
        return cls(torch.stack([output, cross[-1], square, (here * cross.T).sum(1)]), float(moments.gram[-1, -1]))

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of y_q, y, y_q^2 and y_q y, each (O,).

        Raises:
            QatError: there are no rows, or a value was not finite.
        """
        if not self.rows:
            raise QatError("no samples: no output of this layer was seen; calibrate on images that reach it")
        raise_unless_finite(self.sums)
        output, target, square, product = self.sums / self.rows
        return output, target, square, product


def bias_fit(moments: OutputMoments) -> Tensor:
    """The constant c (O,), float32."""
    output, target, _, _ = moments.means()
    return (target - output).float()


def affine_fit(moments: OutputMoments, damping: float) -> tuple[Tensor, Tensor]:
    """The factor a and the constant c, both (O,), float32.

    Factors are positive, from `LEAST_FACTOR` to `MOST_FACTOR`; that of a constant channel is 1.

    Args:
        moments: of the layer.
        damping: d, 0 or more; a large one leaves the factor at 1.
    """
    output, target, square, product = moments.means()
    variance, covariance = square - output.square(), product - output * target
    constant = variance <= LEAST_VARIANCE * square
    slope = (covariance - variance) / (variance.masked_fill(constant, 1.0) * (1 + damping))
    factor = 1 + slope.masked_fill(constant, 0.0)
    factor = factor.clamp(LEAST_FACTOR, MOST_FACTOR)
    return factor.float(), (target - factor * output).float()
