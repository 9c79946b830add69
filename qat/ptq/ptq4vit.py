"""PTQ4ViT (Yuan et al., ECCV 2022, arXiv 2111.12293): steps that are chosen by squared gradients, without training.

Every unit is calibrated on what the float model gives to it. The two differences to the released code: gradients are
those of KL between the float model and one whose unit is quantized, because the float model compared with itself has a
gradient of rounding noise; and all candidates are compared on the samples with the largest gradients, then the best
eight on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from qat.ptq.full_range import FullRange
from qat.ptq.hessian_search import HessianSearch
from qat.ptq.step import Step
from qat.ptq.steps import Preset
from qat.ptq.work import Prefix
from qat.ranges import Range, check_fields


@dataclass
class PTQ4ViT(Preset):
    """PTQ4ViT, for its recipes ptq4vit and ptq4vit_released, and for any other one.

    Args:
        candidates: how many steps are tried for each operand.
        alpha: the first of them, as a part of the step that covers the whole range.
        beta: they end before this part.
        rounds: how often both operands of a product are chosen, at most.
        rows: rows of the output of a product on which candidates are compared: 6,304 are those of 32 images of 224
            pixels, cut into patches of 16.
        prefix: what units see: the output of the units before them as ``float``, or as they are ``quantized``.
    """

    candidates: Annotated[int, Range(2, 100_000)] = 100
    alpha: Annotated[float, Range(above=0, high=1)] = 0.01
    beta: Annotated[float, Range(above=0, high=100)] = 1.2
    rounds: Annotated[int, Range(1, 1000)] = 3
    rows: Annotated[int, Range(1, 1_000_000_000)] = 6304
    prefix: Prefix = "float"

    changes_weights = False

    def __post_init__(self) -> None:
        check_fields(self)
        self.steps()  # refuses what its steps refuse

    def steps(self) -> Sequence[Step]:
        """The full range, then the search."""
        return [FullRange(), HessianSearch(self.candidates, self.alpha, self.beta, self.rounds, self.rows)]
