"""I&S-ViT (Zhong et al. 2023, arXiv 2311.10126): weights move to where they can be rounded, in two stages.

First, weights are trained in floating point while activations are quantized; then, with new ranges, through their
rounding. In the paper, outputs of norms have a step for each channel in the first stage, and norms are folded after it
(``fold: between``). The codes of such an activation are the same when they are folded before, only Adam's steps differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from qat.ptq.channel_steps import FoldChannels, folded_later
from qat.ptq.frontier import IMPORTANCE, start
from qat.ptq.reconstruction.learned_weights import LearnedWeight
from qat.ptq.reconstruction.losses import MSE
from qat.ptq.reconstruction.reconstruct import Reconstruct, ReconstructionOptions
from qat.ptq.reconstruction.straight_through import StraightThrough, TrainedWeight
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Preset, options_of
from qat.ptq.tensor_search import fit
from qat.ptq.unit_work import UnitWork
from qat.ranges import Range
from qat.sites.insert import WeightSite


@dataclass
class ISViT(ReconstructionOptions, Preset):
    """For its recipe is_vit, and any other one, from the start that `Frontier` has before it rounds weights.

    Args:
        iterations: of each stage, for each unit.
        lr: learning rate of weights.
        fold: when norms are folded.
    """

    iterations: Annotated[int, Range(1, 10_000_000)] = 1000
    batch: Annotated[int, Range(1, 100_000)] = 64
    step_lr: Annotated[float, Range(low=0, high=1)] = 0.0
    interval_lr: Annotated[float, Range(low=0, high=1)] = 0.0
    lr: Annotated[float, Range(above=0, high=1)] = 4e-5
    fold: Literal["before", "between"] = "before"

    importance = IMPORTANCE

    def steps(self) -> Sequence[Step]:
        """The start, then both stages."""
        options = options_of(self, ReconstructionOptions)
        first = Reconstruct(weights=FloatWeights(self.lr), input="float", head_loss=MSE(), **options)
        second = Reconstruct(weights=StraightThrough(self.lr), head_loss=MSE(), **options)
        if self.fold == "between":
            return [*folded_later(start()), first, FoldChannels(), FitWeights(), second]
        return [*start(), first, FitWeights(), second]


@dataclass
class FloatWeights(StraightThrough):
    """The weight is trained without rounding; its range has to be chosen again afterwards.

    Args:
        lr: learning rate.
    """

    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight:
        """The weight."""
        return FloatWeight(site.quantizer, site.weight)


class FloatWeight(TrainedWeight):
    """A weight that is trained and not rounded."""

    def forward(self, weight: Tensor) -> Tensor:
        """The trained values."""
        return self.value


@dataclass
class FitWeights(Step):
    """Every weight of a unit gets the range of the least squared error again, after a step has changed it."""

    stage = Stage.RECONSTRUCT

    def finish(self, here: UnitWork) -> None:
        """Fill the quantizers of the weights of a unit."""
        for _, weight, quantizer in here.wanted_weights():
            fit(quantizer, quantizer.grouped(weight.detach().float()), levels=1)
