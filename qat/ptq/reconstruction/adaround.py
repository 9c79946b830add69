"""Weights that are rounded up or down: AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.reconstruction.learned_weights import LearnedWeight, WeightRule
from qat.quantizers import Quantizer
from qat.ranges import Range, check_fields
from qat.sites.insert import WeightSite

STRETCH = (-0.1, 1.1)  # gamma and zeta: a sigmoid between them reaches 0 and 1


@dataclass
class AdaRound(WeightRule):
    """Every weight is rounded up or down.

    value = s * (clip(floor(W / s) + h(V) + z, qmin, qmax) - z),   h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

    V starts where h is the fraction of W / s, so that the first values are W; in the end h is 0 or 1. A regulariser
    drives it there: the sum of 1 - |2 h - 1|**beta, after a part of all iterations that is free of it.

    Args:
        lr: learning rate of V.
        regularizer: weight of the regulariser.
        free: share of the iterations without it.
        first_beta: exponent at its start.
        last_beta: exponent at the end.
    """

    lr: Annotated[float, Range(above=0, high=1)] = 1e-3
    regularizer: Annotated[float, Range(low=0, high=100)] = 0.01
    free: Annotated[float, Range(low=0, below=1)] = 0.2
    first_beta: Annotated[float, Range(1, 100)] = 20.0
    last_beta: Annotated[float, Range(1, 100)] = 2.0

    schedule = "constant"

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, site: WeightSite) -> None:
        """Refuse values that are not evenly spaced."""
        if site.quantizer.affine() is None:
            raise QatError(
                f"AdaRound rounds to evenly spaced values, and {site.name!r} has {site.quantizer.spec}: use Uniform "
                "with a whole zero point, or another rule for weights, such as StraightThrough"
            )

    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight:
        """V of the fractions; QatError where values are not evenly spaced."""
        self.check(site)
        return RoundedWeight(site.quantizer, site.weight, self)

    def beta(self, progress: float) -> float:
        """The exponent at a share 0 to 1 of all iterations."""
        done = (progress - self.free) / (1 - self.free)
        return self.first_beta + (self.last_beta - self.first_beta) * done


class RoundedWeight(LearnedWeight):
    """A weight that is rounded up or down."""

    def __init__(self, quantizer: Quantizer, weight: Tensor, rule: AdaRound) -> None:
        super().__init__(quantizer, weight)
        affine = quantizer.affine()
        assert affine is not None, "the rule has checked it"
        self.rule = rule
        self.scale, zero = quantizer.view(affine.scale, weight), quantizer.view(affine.zero_point, weight)
        self.low, self.high = affine.qmin - zero, affine.qmax - zero
        ratio = weight.detach().float() / self.scale
        self.floor = ratio.floor()
        gamma, zeta = STRETCH
        self.V = nn.Parameter(-((zeta - gamma) / (ratio - self.floor - gamma) - 1).log())
        self._trained: Tensor | None = None  # h of the last forward in training, which the regularizer shares

    def up(self) -> Tensor:
        """h, how far every weight is rounded up."""
        gamma, zeta = STRETCH
        return (self.V.sigmoid() * (zeta - gamma) + gamma).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Values between two codes in training, on one of them in evaluation mode."""
        up = self.up() if self.training else (self.V >= 0).to(self.V.dtype)
        self._trained = up if self.training else None
        return torch.clamp(self.floor + up, self.low, self.high) * self.scale

    def regularizer(self, progress: float) -> Tensor | None:
        """The distance of h from 0 and 1."""
        up, self._trained = self._trained, None
        if progress < self.rule.free or not self.rule.regularizer:
            return None
        up = self.up() if up is None else up
        bend = (2 * up - 1).abs().pow(self.rule.beta(progress))
        return self.rule.regularizer * (1 - bend).sum()

    @torch.no_grad()
    def folded(self, weight: Tensor) -> Tensor:
        """The values of the codes, which nearest rounding finds again."""
        up = (self.V >= 0).to(self.V.dtype)
        return torch.clamp(self.floor + up, self.low, self.high) * self.scale
