"""GLF-Q (2026): units are reconstructed by what becomes of their output at the end of the network.

The quantized output of a unit goes through the float units after it, and what the head reads is compared, beside the
output itself. Weights and steps are trained through their rounding. The reconstruction of
MLPs is left out. Shapes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from qat.ptq.frontier import IMPORTANCE, start
from qat.ptq.reconstruction.losses import PerFirst, ReconstructionLoss, UnitLoss
from qat.ptq.reconstruction.reconstruct import Reconstruct, ReconstructionOptions
from qat.ptq.reconstruction.straight_through import StraightThrough
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ptq.step import Step
from qat.ptq.steps import Preset, options_of
from qat.ranges import Range, check_fields
from qat.sites.hooks import watching


@dataclass
class GLFQ(ReconstructionOptions, Preset):
    """Fills any recipe, from the start that `Frontier` has before it rounds weights.

    Args:
        lr: learning rate of weights.
        local: weight of the squared error of a unit.
    """

    iterations: Annotated[int, Range(1, 10_000_000)] = 3000
    step_lr: Annotated[float, Range(low=0, high=1)] = 2e-4
    lr: Annotated[float, Range(above=0, high=1)] = 2e-5
    local: Annotated[float, Range(low=0, high=1000)] = 2.0

    importance = IMPORTANCE

    def steps(self) -> Sequence[Step]:
        """The start, then the reconstruction."""
        options = options_of(self, ReconstructionOptions)
        loss, weights = SuffixFeature(self.local), StraightThrough(self.lr)
        return [*start(), Reconstruct(weights=weights, loss=loss, **options)]


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

        return UnitLoss(loss, [one, two])


def feature(data: UnitData, out: Tensor) -> Tensor:
    """What the last layer of the float model reads, from an output (B, ...) of the unit; of the head, the logits."""
    seen: list[Tensor] = []
    layers = {name: m for name, m in data.here.model.named_modules() if hasattr(m, "weight_quant")}

    def see(name: str, args: tuple[Any, ...]) -> None:
        seen[:] = [args[0]]

    with watching(layers, before=see):
        logits = data.rest(out)
    return seen[0] if seen else logits
