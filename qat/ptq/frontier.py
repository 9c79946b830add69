"""The most accurate calibration that we know without training: what several papers found, in one list of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from qat.ptq.fold_norms import FoldNorms
from qat.ptq.output_search import OutputSearch
from qat.ptq.rotate_heads import RotateHeads
from qat.ptq.rotate_residual import RotateResidual
from qat.ptq.step import Step
from qat.ptq.steps import Preset
from qat.ptq.tensor_search import TensorSearch
from qat.ptq.weight_correction import GPTQ, Ridge
from qat.ranges import Range, check_fields

IMPORTANCE = 0.25  # share by which tokens count by how much the float model's predictions depend on them


def start(rounds: int = 2, rows: int = 6304) -> list[Step]:
    """What comes before weights are rounded, here and in every reconstruction."""
    return [
        RotateResidual(optional=True),
        RotateHeads(optional=True),
        FoldNorms(optional=True, strength=None),
        TensorSearch(),
        OutputSearch(rounds=rounds, rows=rows),
        Ridge(),
    ]


@dataclass
class Frontier(Preset):
    """Rotations, fold of norms, output search, ridge regression and GPTQ; fills any recipe, best `frontier`.

    Norms are folded where their readers have Uniform with one step, heads and the residual stream are rotated where the
    model allows it; these steps are left out elsewhere.

    Args:
        rounds: how often both operands of a product are searched.
        rows: rows of the output of a product on which candidates are compared.
        damping: of GPTQ, as a share of the mean of the diagonal.
        importance: share by which tokens count by how much the float model's predictions depend on them.
    """

    rounds: Annotated[int, Range(1, 1000)] = 2
    rows: Annotated[int, Range(1, 1_000_000_000)] = 6304
    damping: Annotated[float, Range(above=0, high=10)] = 0.3
    importance: Annotated[float, Range(low=0, high=1)] = IMPORTANCE

    def __post_init__(self) -> None:
        check_fields(self)

    def steps(self) -> Sequence[Step]:
        """The list."""
        return [*start(self.rounds, self.rows), GPTQ(damping=self.damping, alpha=0.0)]
