"""AIQViT (Jiang et al., AAAI 2025, arXiv 2502.04628): low-rank compensation, learned intervals, easy images first.

Its authors have released no code; where the paper leaves something open, an option says what is done here. Steps of
activations stay. Every layer is `LowRank`, probabilities are quantized by `DFQ`.

| ``fold`` | when steps of the channels behind a norm become one |
|---|---|
| before | at first: what is learned through the rounding of a weight does not survive a later change of its columns |
| between | after a first stage that trains weights in floating point, as in I&S-ViT |
| after | in the end, as the paper has it: weights get new ranges, and are trained again |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from qat.errors import QatError
from qat.ptq.channel_steps import FoldChannels, folded_later
from qat.ptq.frontier import IMPORTANCE, start
from qat.ptq.is_vit import FitWeights, FloatWeights
from qat.ptq.reconstruction.curriculum import Curriculum
from qat.ptq.reconstruction.losses import MSE
from qat.ptq.reconstruction.low_rank import LowRank, Mode, Rank, RankSearch
from qat.ptq.reconstruction.reconstruct import Reconstruct, ReconstructionOptions
from qat.ptq.step import Step
from qat.ptq.steps import Preset, options_of
from qat.ranges import Range


@dataclass
class AIQViT(ReconstructionOptions, Preset):
    """For its recipe aiqvit, and any other one, from the start that `Frontier` has before it rounds weights.

    Args:
        rank: of the compensation of every layer; null searches one for each.
        search: how it is searched.
        lr: learning rate of the compensation.
        fold: when norms are folded.
        more: iterations of the further stage that ``fold`` between, or after, needs.
        mode: of the compensation: ``merged`` into the weight and rounded, or at its ``side``, see `LowRank`.
        curriculum: the order of the images; null for none.
    """

    iterations: Annotated[int, Range(1, 10_000_000)] = 6000
    batch: Annotated[int, Range(1, 100_000)] = 24
    step_lr: Annotated[float, Range(low=0, high=1)] = 0.0
    rank: Rank | None = None
    search: RankSearch = field(default_factory=RankSearch)
    lr: Annotated[float, Range(above=0, high=1)] = 4e-5
    mode: Mode = "merged"
    fold: Literal["before", "between", "after"] = "before"
    more: Annotated[int, Range(1, 10_000_000)] = 1000
    curriculum: Curriculum | None = field(default_factory=Curriculum)

    importance = IMPORTANCE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "side" and self.fold == "after":
            raise QatError(
                "AIQViT: with mode side, layers stay in floating point, and fold after would round them anew"
            )

    def steps(self) -> Sequence[Step]:
        """The start, then the reconstruction, and a further stage before or after it."""
        if self.fold == "before":
            return [*start(), self._stage(self.iterations)]
        split, folded = folded_later(start()), [FoldChannels(), FitWeights()]
        if self.fold == "between":
            first = replace(self._stage(self.more), weights=FloatWeights(self.lr), input="float", curriculum=None)
            return [*split, first, *folded, self._stage(self.iterations)]
        return [*split, self._stage(self.iterations), *folded, self._stage(self.more)]

    def _stage(self, iterations: int) -> Reconstruct:
        options = {**options_of(self, ReconstructionOptions), "iterations": iterations}
        weights = LowRank(self.rank, self.lr, self.search, self.mode)
        return Reconstruct(weights=weights, head_loss=MSE(), curriculum=self.curriculum, **options)
