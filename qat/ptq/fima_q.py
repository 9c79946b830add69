"""FIMA-Q (Wu et al., CVPR 2025, arXiv 2506.11543): the Fisher matrix of an output as a diagonal and a part of low rank.

At k times of the training, the gradient g_j of KL(float || quantized) at the output of a unit and its error d_j are
measured, both as the mean of absolute values over images. With D the difference of outputs of an image::

    A_j = sum |D| g_j,   M = d d^T (k, k),   loss = A M^-1 A^T + mean(D^2 mean_j g_j)

each term over its first value after every measurement. The steps of single tokens are left out.
Shapes: B images of a batch, n all images, k measurements so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from qat.ptq.qdrop import QDrop
from qat.ptq.reconstruction.losses import PerFirst, ReconstructionLoss, Temperature, UnitLoss
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ranges import Range, check_fields

DAMPING = 0.01  # of M, as a part of the mean of its diagonal: its rows are almost the same


@dataclass
class FIMAQ(QDrop):
    """`QDrop` whose loss is that of FIMA-Q.

    Args:
        loss: what the output of a unit is compared by; null is FisherLowRank.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss = self.loss or FisherLowRank()


@dataclass
class FisherLowRank(ReconstructionLoss):
    """A diagonal and a part of low rank.

    Args:
        measurements: k at the end.
        temperature: divides the logits.
    """

    measurements: Annotated[int, Range(1, 1000)] = 5
    temperature: Temperature = 20.0

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, data: UnitData) -> UnitLoss:
        """Measure at the start, and again in equal parts of the training."""
        found = Measurements(data, self.temperature)

        def refresh(progress: float) -> None:
            if len(found.gradients) <= progress * self.measurements:
                found.measure()

        return UnitLoss(found.value, [found], refresh, version=lambda: len(found.gradients))


class Measurements:
    """What has been measured at the output of a unit so far.

    Args:
        data: of the unit.
        temperature: divides the logits.
    """

    def __init__(self, data: UnitData, temperature: float) -> None:
        self.data, self.temperature = data, temperature
        self.gradients: list[Tensor] = []
        self.errors: list[Tensor] = []

    @torch.no_grad()
    def measure(self) -> None:
        """Once more, with the unit as it is now."""
        data, error, gradient = (
            self.data,
            torch.zeros_like(self.data.targets[0]),
            torch.zeros_like(self.data.targets[0]),
        )
        for part in data.parts():
            out = data.here.unit.run(data.inputs[part])
            error += (out - data.targets[part]).abs().sum(0)
            gradient += data.gradient(out, part, self.temperature).abs().sum(0)
        self.gradients.append(gradient / len(data))
        self.errors.append(error / len(data))
        self._combine()

    def _combine(self) -> None:
        self.g, d = torch.stack(self.gradients).flatten(1), torch.stack(self.errors).flatten(1).double()  # (k, ...)
        self.inverse = low_rank_inverse(d).to(self.g)
        self.first = PerFirst(), PerFirst()

    def state(self) -> Any:
        """All measurements, and the first values since the last one."""
        return self.gradients, self.errors, [first.state() for first in self.first]

    def load(self, state: Any) -> None:
        """Go on from there."""
        device = self.data.targets.device
        self.gradients, self.errors = ([x.to(device) for x in part] for part in state[:2])
        self._combine()
        for first, own in zip(self.first, state[2], strict=True):
            first.load(own)

    def value(self, out: Tensor, picks: Tensor) -> Tensor:
        """The loss."""
        D = (out - self.data.targets[picks]).flatten(1)
        A = D.abs() @ self.g.mT  # (B, k)
        low_rank = ((A @ self.inverse) * A).sum(1).mean()
        diagonal = (D.square() * self.g.mean(0)).mean()
        return self.first[0](low_rank) + self.first[1](diagonal)


def low_rank_inverse(d: Tensor) -> Tensor:
    """The inverse (k, k) of d d^T, damped, for errors (k, values) in float64."""
    M = d @ d.mT
    mean = M.diagonal().mean().clamp(min=torch.finfo(M.dtype).tiny)
    damped = M / mean + DAMPING * torch.eye(len(M), dtype=M.dtype, device=M.device)
    inverse: Tensor = torch.linalg.inv(damped) / mean
    return inverse
