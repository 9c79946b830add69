"""Weights that are trained through their rounding, whose gradient is taken for that of the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.ptq.reconstruction.learned_weights import LearnedWeight, WeightRule
from qat.quantizers import Affine, Quantizer
from qat.ranges import Range, check_fields
from qat.sites.insert import WeightSite


@dataclass
class StraightThrough(WeightRule):
    """The weight itself is trained, through its rounding.

    Args:
        lr: learning rate.
    """

    lr: Annotated[float, Range(above=0, high=1)] = 4e-5

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight:
        """The weight."""
        return TrainedWeight(site.quantizer, site.weight)


class TrainedWeight(LearnedWeight):
    """A weight that is trained."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        self.value = nn.Parameter(weight.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded values."""
        return straight_through(self.quantizer, self.value)

    def folded(self, weight: Tensor) -> Tensor:
        """The trained values."""
        return self.value.detach()


def straight_through(quantizer: Quantizer, x: Tensor) -> Tensor:
    """The values of a quantizer, whose gradient passes wherever a value is rounded to a code that exists.

    The gradient of a quantizer itself ends at its last code, half a step earlier.
    """
    affine = quantizer.affine()
    if affine is None:
        return cast(Tensor, quantizer(x))
    return cast(Tensor, StraightThroughRounding.apply(x, quantizer, affine))


class StraightThroughRounding(torch.autograd.Function):
    """The gradient of `straight_through`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, affine: Affine) -> Tensor:
        """The values of the quantizer."""
        code = (x / quantizer.view(affine.scale, x)).round_() + quantizer.view(affine.zero_point, x)
        ctx.save_for_backward((code >= affine.qmin) & (code <= affine.qmax))
        return cast(Tensor, quantizer(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``x``."""
        (passes,) = ctx.saved_tensors
        return grads[0] * passes, None, None
