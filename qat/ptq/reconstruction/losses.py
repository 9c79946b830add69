"""What the output of a unit is compared by: all losses have one interface, and are 1 at their start.

With D the difference of a unit's output to that of the float model, and means over images and values::

    MSE                  D^2
    FisherDiagonal       D^2 g^2, g the gradient of KL(float || quantized) at the output: BRECQ (ICLR 2021)
    PerturbationHessian  D^2 |F r|, F the Fisher matrix of the output, r signs, a mean over images: APHQ-ViT (CVPR 2025)
    Prediction           KL of the logits, with D^2: PD-Quant (CVPR 2023)
    SuffixFeature        the square error of what the head reads, with D^2: GLF-Q (2026)

Shapes: B images of a batch, n all images, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from qat.ptq.reconstruction.unit_data import UnitData
from qat.ranges import Range, Seed, check_fields
from qat.sites.hooks import watching

TINY = 1e-30
UnitLoss = Callable[[Tensor, Tensor], Tensor]  # the output (B, ...) and which images it is for (B,) -> a scalar
Temperature = Annotated[float, Range(above=0, high=1000)]


class ReconstructionLoss(ABC):
    """A way to compare outputs, as options."""

    @abstractmethod
    def start(self, data: UnitData) -> UnitLoss:
        """The loss of one unit."""


class PerFirst:
    """Divides a value by its first one, so that it starts at 1 and sums of several mean something."""

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The quotient; a first value of zero stays as it is."""
        if self.first is None:
            found = value.detach()
            self.first = torch.where(found > TINY, found, torch.ones_like(found))
        return value / self.first


@dataclass
class MSE(ReconstructionLoss):
    """The squared error."""

    def start(self, data: UnitData) -> UnitLoss:
        """Over its first value."""
        first = PerFirst()
        return lambda out, picks: first((out - data.targets[picks]).square().mean())


@dataclass
class FisherDiagonal(ReconstructionLoss):
    """Errors weighted by squared gradients, image by image.

    Args:
        damped: as the released code has it: one is added to the absolute value of a gradient.
        temperature: divides the logits.
    """

    damped: bool = False
    temperature: Temperature = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, data: UnitData) -> UnitLoss:
        """Compute all gradients, with the unit as it is quantized now."""
        run = data.here.unit.run
        found = [data.gradient(run(data.inputs[part]), part, self.temperature) for part in data.parts()]
        weights = fisher_weights(torch.cat(found), self.damped)
        first = PerFirst()
        return lambda out, picks: first(((out - data.targets[picks]).square() * weights[picks]).mean())


def fisher_weights(gradients: Tensor, damped: bool) -> Tensor:
    """g^2, or (|g| + 1)^2."""
    return (gradients.abs() + 1).square() if damped else gradients.square()


@dataclass
class PerturbationHessian(ReconstructionLoss):
    """Errors weighted by how the gradient of the prediction moves with the output: one weight for each of its values.

    APHQ-ViT adds a small constant to the output, takes it away, and compares both gradients; in the limit, this is F 1.
    Behind a LayerNorm, which removes constants, F 1 is zero: what a program finds there is rounding noise. So here
    the values of an output are moved up and down at random, and the weight is |F r|, r signs: the size of a row of F.

    Args:
        temperature: T, which divides the logits.
        seed: draws the signs.
    """

    temperature: Temperature = 20.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, data: UnitData) -> UnitLoss:
        """Compute the weights, from the float model."""
        generator, total = torch.Generator().manual_seed(self.seed), torch.zeros_like(data.targets[0])
        for part in data.parts():
            out = data.targets[part]
            signs = torch.randint(2, out.shape, generator=generator).mul_(2).sub_(1).to(out)
            total += perturbed(data.rest, out, signs, self.temperature).abs().sum(0)
        weights, first = total / len(data), PerFirst()
        return lambda out, picks: first(((out - data.targets[picks]).square() * weights).mean())


def perturbed(rest: Callable[[Tensor], Tensor], out: Tensor, move: Tensor, temperature: float) -> Tensor:
    """F r for every image (B, ...): the Fisher matrix of softmax(logits / T) at an output, times a tensor like it.

    F = J^T (diag(p) - p p^T) J / T^2, by one derivative forward and one backward.
    """
    with torch.no_grad(), forward_ad.dual_level():
        logits, moved = forward_ad.unpack_dual(rest(forward_ad.make_dual(out, move)))
    probs, u = (logits / temperature).softmax(-1), moved / temperature
    v = probs * (u - (probs * u).sum(-1, keepdim=True))  # (diag(p) - p p^T) u
    with torch.enable_grad():
        out = out.detach().requires_grad_()
        return torch.autograd.grad((rest(out) / temperature * v).sum(), out)[0]


@dataclass
class Prediction(ReconstructionLoss):
    """The difference of the predictions, beside the squared error.

    Args:
        local: weight of the squared error.
    """

    local: Annotated[float, Range(low=0, high=1000)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, data: UnitData) -> UnitLoss:
        """Both over their first values."""
        one, two = PerFirst(), PerFirst()

        def loss(out: Tensor, picks: Tensor) -> Tensor:
            local = one((out - data.targets[picks]).square().mean())
            return two(divergence(data.rest(out), data.logits[picks])) + self.local * local

        return loss


@dataclass
class Logits(ReconstructionLoss):
    """KL of the logits alone: for the head, and for a unit whose output nothing else has to resemble."""

    def start(self, data: UnitData) -> UnitLoss:
        """Over its first value."""
        first = PerFirst()
        return lambda out, picks: first(divergence(data.rest(out), data.logits[picks]))


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || logits), the mean over images."""
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)


@dataclass
class SuffixFeature(ReconstructionLoss):
    """The squared error of what the head reads, beside that of the unit.

    Args:
        local: weight of the squared error of the unit.
    """

    local: Annotated[float, Range(low=0, high=1000)] = 2.0

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, data: UnitData) -> UnitLoss:
        """Compute the features of the float model."""
        with torch.no_grad():
            features = torch.cat([feature(data, data.targets[part]) for part in data.parts()])
        one, two = PerFirst(), PerFirst()

        def loss(out: Tensor, picks: Tensor) -> Tensor:
            local = one((out - data.targets[picks]).square().mean())
            return two((feature(data, out) - features[picks]).square().mean()) + self.local * local

        return loss


def feature(data: UnitData, out: Tensor) -> Tensor:
    """What the last layer of the float model reads, from an output (B, ...) of the unit; of the head, the logits."""
    seen: list[Tensor] = []
    layers = {name: m for name, m in data.here.model.named_modules() if hasattr(m, "weight_quant")}

    def see(name: str, args: tuple[Any, ...]) -> None:
        seen[:] = [args[0]]

    with watching(layers, before=see):
        logits = data.rest(out)
    return seen[0] if seen else logits
