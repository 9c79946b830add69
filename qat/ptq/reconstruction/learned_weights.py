"""What is learned about the weight of a layer while its unit is reconstructed.

A `WeightRule` states a way, as options; a `LearnedWeight` is one weight that follows it. It stands in the place of the
weight's quantizer, is given the weight as it was, and returns the values that the layer multiplies by. In the end it
becomes a plain weight, which the quantizer rounds to the very same values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.ptq.reconstruction.adam import Adam, Group
from qat.quantizers import Affine, Quantizer
from qat.ranges import Range, check_fields
from qat.sites.insert import WeightSite

Schedule = Literal["constant", "cosine"]
STRETCH = (-0.1, 1.1)  # gamma and zeta of AdaRound: a sigmoid between them reaches 0 and 1


class LearnedWeight(nn.Module, ABC):
    """One weight; its own parameters are what is learned.

    Args:
        quantizer: of the weight, calibrated; its parameters stay.
        weight: before it is learned.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The values that the layer multiplies by, in evaluation mode those of the end."""

    def regularizer(self, progress: float) -> Tensor | None:
        """What is added to the loss, at a share 0 to 1 of all iterations."""
        return None

    @abstractmethod
    def folded(self, weight: Tensor) -> Tensor:
        """A plain weight for which the quantizer gives, bit for bit, the values of evaluation mode."""

    def learned(self) -> list[nn.Parameter]:
        """The parameters that are learned."""
        own = {id(parameter) for parameter in self.quantizer.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]


class WeightRule(ABC):
    """How weights are learned.

    Attributes:
        lr: learning rate of Adam; 0 where nothing is learned.
        schedule: what becomes of it.
        ticks: iterations of `prepare`.
    """

    lr = 0.0
    schedule: Schedule = "cosine"
    ticks = 0

    def prepare(  # noqa: B027  most rules have nothing to choose
        self, sites: Sequence[WeightSite], train: StartTraining, generator: torch.Generator
    ) -> None:
        """Choose, before the weights (sites) of a unit start, what cannot be chosen for all units alike."""

    def check(self, site: WeightSite) -> None:  # noqa: B027  most rules can learn every weight
        """Raise QatError, before any work, for a weight that cannot be learned in this way."""

    @abstractmethod
    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight | None:
        """A weight at its start; None where nothing is learned about it."""


class UnitTraining(Protocol):
    """The training of a unit, as far as a rule takes part in it."""

    images: Tensor
    groups: list[Group]
    batch: int

    def learning(self) -> AbstractContextManager[None]:
        """Gradients for what is learned, inside the block."""

    def iterate(self, adam: Adam, picks: Tensor, progress: float) -> None:
        """One step on the loss of some images."""


StartTraining = Callable[[Mapping[str, LearnedWeight]], AbstractContextManager[UnitTraining]]


@dataclass
class Nearest(WeightRule):
    """Weights stay as they are; only steps of activations are learned."""

    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight | None:
        """Nothing."""
        return None


@dataclass
class AdaRound(WeightRule):
    """Every weight is rounded up or down (Nagel et al., ICML 2020, arXiv 2004.10568).

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

    def up(self) -> Tensor:
        """h, how far every weight is rounded up."""
        gamma, zeta = STRETCH
        return (self.V.sigmoid() * (zeta - gamma) + gamma).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Values between two codes in training, on one of them in evaluation mode."""
        up = self.up() if self.training else (self.V >= 0).to(self.V.dtype)
        return torch.clamp(self.floor + up, self.low, self.high) * self.scale

    def regularizer(self, progress: float) -> Tensor | None:
        """The distance of h from 0 and 1."""
        if progress < self.rule.free or not self.rule.regularizer:
            return None
        bend = (2 * self.up() - 1).abs().pow(self.rule.beta(progress))
        return self.rule.regularizer * (1 - bend).sum()

    @torch.no_grad()
    def folded(self, weight: Tensor) -> Tensor:
        """The values of the codes, which nearest rounding finds again."""
        up = (self.V >= 0).to(self.V.dtype)
        return torch.clamp(self.floor + up, self.low, self.high) * self.scale


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
