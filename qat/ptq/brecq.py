"""BRECQ (Li et al., ICLR 2021, arXiv 2102.05426): blocks are reconstructed one after the other, by rounding up or down.

Weights and steps of activations are learned together, as ports to vision transformers do it, and a unit reads what the
quantized units before it give. With D the difference of outputs, the paper weights D^2 by the squared gradient of
KL(float || quantized) there (`FisherDiagonal`); its code, and the ports, take D^2 alone.
Shapes: B images of a batch, n all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qat.ptq.frontier import IMPORTANCE, start
from qat.ptq.reconstruction.adaround import AdaRound
from qat.ptq.reconstruction.losses import PerFirst, ReconstructionLoss, Temperature, UnitLoss
from qat.ptq.reconstruction.reconstruct import Reconstruct, ReconstructionOptions
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ptq.step import Step
from qat.ptq.steps import Preset, options_of
from qat.ranges import Range, check_fields


@dataclass
class BRECQ(ReconstructionOptions, Preset):
    """Fills any recipe of `Uniform` or `LSQ`, from the start that `Frontier` has before it rounds weights.

    Args:
        loss: what the output of a unit is compared by; null is MSE.
        lr: learning rate of the rounding; with few iterations, more than the published 1e-3.
    """

    loss: ReconstructionLoss | None = None
    lr: Annotated[float, Range(above=0, high=1)] = 1e-3

    importance = IMPORTANCE

    def steps(self) -> Sequence[Step]:
        """The start, then the reconstruction."""
        options = options_of(self, ReconstructionOptions)
        return [*start(), Reconstruct(weights=AdaRound(self.lr), loss=self.loss, **options)]


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
        return UnitLoss(
            lambda out, picks: first(((out - data.targets[picks]).square() * weights[picks]).mean()), [first]
        )


def fisher_weights(gradients: Tensor, damped: bool) -> Tensor:
    """g^2, or (|g| + 1)^2."""
    return (gradients.abs() + 1).square() if damped else gradients.square()
