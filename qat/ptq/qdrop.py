"""QDrop (Wei et al., ICLR 2022, arXiv 2203.05740): BRECQ, while a part of all activations is not quantized.

With a probability of a half each, a value of the input of a unit is that of the float model, and a value at an
activation site inside it passes as it is. What is learned then holds for more than the errors of these images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from qat.ptq.frontier import IMPORTANCE, start
from qat.ptq.reconstruction.adaround import AdaRound
from qat.ptq.reconstruction.losses import ReconstructionLoss
from qat.ptq.reconstruction.reconstruct import Reconstruct, ReconstructionOptions
from qat.ptq.step import Step
from qat.ptq.steps import Preset, options_of
from qat.ranges import Range


@dataclass
class QDrop(ReconstructionOptions, Preset):
    """Fills any recipe of `Uniform` or `LSQ`, from the start that `Frontier` has before it rounds weights.

    Args:
        loss: what the output of a unit is compared by; null is MSE.
        keep: probability with which a value is quantized.
        lr: learning rate of the rounding; with few iterations, more than the published 1e-3.
    """

    loss: ReconstructionLoss | None = None
    keep: Annotated[float, Range(low=2**-16, high=1)] = 0.5
    lr: Annotated[float, Range(above=0, high=1)] = 1e-3

    importance = IMPORTANCE

    def steps(self) -> Sequence[Step]:
        """The start, then the reconstruction."""
        options = options_of(self, ReconstructionOptions)
        rule = AdaRound(self.lr)
        return [*start(), Reconstruct(weights=rule, loss=self.loss, input="mixed", keep=self.keep, **options)]
