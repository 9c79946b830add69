"""Weights that a sum of low rank moves before they are rounded: AIQViT (AAAI 2025, arXiv 2502.04628), equations 9-14.

A layer multiplies by Q(W + B A) with W as it is, so that in the end there is one matrix of codes and no B or A. The
paper can be read as Q(W) + B A, too, which needs B and A on the device: that is mode ``side``. Where the rank is
searched, every layer has a pair of factors and a logit for each candidate, and B A stands for

    sum_i p_i B_i A_i,   p = softmax(alpha)

While the factors are trained on some of the images, the logits are trained on the others, in turns (DARTS, first
order). In every iteration each candidate is dropped with some probability, but never all of them, and the others share
its part. The rank with the largest logit wins, and its factors start anew.
Shapes: O outputs and I inputs of a layer (a convolution reads patches), r rank, m candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.reconstruction.adam import Adam, Draws, Group
from qat.ptq.reconstruction.learned_weights import LearnedWeight, StartTraining, WeightRule
from qat.ptq.reconstruction.straight_through import straight_through
from qat.quantizers import Quantizer
from qat.ranges import Range, check_fields
from qat.sites.insert import WeightSite

log = logging.getLogger(__name__)
Rank = Annotated[int, Range(1, 100_000)]
Mode = Literal["merged", "side", "requantized"]
ALPHA_BETAS = (0.5, 0.999)  # of Adam, as in DARTS


@dataclass
class RankSearch:
    """How ranks are searched.

    Args:
        candidates: ranks that are tried for every layer.
        iterations: for each unit; each is a step of the logits and one of the factors.
        alpha_lr: learning rate of the logits.
        validation: share of the images that the logits are trained on.
        drop_path: probability with which a candidate is dropped.
    """

    candidates: Sequence[Rank] = (20, 40, 60, 80, 100)
    iterations: Annotated[int, Range(1, 10_000_000)] = 2000
    alpha_lr: Annotated[float, Range(above=0, high=10)] = 3e-3
    validation: Annotated[float, Range(above=0, below=1)] = 0.5
    drop_path: Annotated[float, Range(low=0, below=1)] = 0.15

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.candidates:
            raise QatError("RankSearch: candidates is empty: give ranks, such as [20, 100]")


@dataclass
class LowRank(WeightRule):
    """A sum of rank r is added to a weight.

    A starts uniform in +-1/sqrt(I) and B at zero, so that the first values are those of nearest rounding.

    Args:
        rank: of every layer; null searches one for each.
        lr: learning rate of A and B.
        search: how it is searched.
        mode: ``merged`` rounds the sum. ``side`` adds it to the rounded weight, and the layer stays in floating point.
            ``requantized`` is trained as side, and its sum is rounded in the end.
    """

    rank: Rank | None = None
    lr: Annotated[float, Range(above=0, high=1)] = 4e-5
    search: RankSearch = field(default_factory=RankSearch)
    mode: Mode = "merged"

    def __post_init__(self) -> None:
        check_fields(self)
        self.found: dict[str, int] = {}  # by site
        self.kind = {"merged": CompensatedWeight, "side": SideWeight, "requantized": RequantizedWeight}[self.mode]

    @property
    def ticks(self) -> int:  # type: ignore[override]
        """Those of the search."""
        return 0 if self.rank else 2 * self.search.iterations

    def prepare(self, sites: Sequence[WeightSite], train: StartTraining, generator: torch.Generator) -> None:
        """Search a rank for every site."""
        if self.rank or not sites:
            return
        mixed = {site.name: MixedRanks(site, self.search, self.kind, generator) for site in sites}
        with train(mixed) as training, training.learning():
            training.title = "search of ranks, "
            if len(training.images) < 2:
                raise QatError("LowRank searches ranks on two parts of the images: give more images, or a rank")
            order = training.images[torch.randperm(len(training.images), generator=generator)]
            count = max(1, min(len(order) - 1, int(self.search.validation * len(order))))
            factors = Group([p for weight in mixed.values() for p in weight.factors], self.lr, cosine=True)
            logits = Group([weight.alpha for weight in mixed.values()], self.search.alpha_lr, cosine=False)
            turns = (
                (Adam([logits], ALPHA_BETAS), order[:count], Draws(training.batch, generator)),
                (Adam([factors, *training.groups]), order[count:], Draws(training.batch, generator)),
            )
            for t in range(self.search.iterations):
                for adam, images, draws in turns:
                    for weight in mixed.values():
                        weight.draw()
                    training.iterate(adam, draws.next(images), t / self.search.iterations)
        self.found |= {name: weight.rank for name, weight in mixed.items()}

    def prepared(self) -> dict[str, int]:
        """The ranks that were found, by site."""
        return dict(self.found)

    def restore(self, prepared: dict[str, int]) -> None:
        """Take ranks that were found."""
        self.found |= prepared

    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight:
        """A at random, B of zeros."""
        rank = self.rank or self.found[site.name]
        if rank > (full := min(site.weight.flatten(1).shape)):
            log.warning("%s: a sum of rank %d, and the weight has rank %d at most", site.name, rank, full)
        return self.kind(site.quantizer, site.weight, rank, generator)


class CompensatedWeight(LearnedWeight):
    """A weight with a sum of rank r."""

    def __init__(self, quantizer: Quantizer, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__(quantizer, weight)
        rows, columns = weight.flatten(1).shape
        A = torch.rand(rank, columns, generator=generator).mul_(2).sub_(1).div_(sqrt(columns))
        self.A = nn.Parameter(A.to(weight))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))

    @staticmethod
    def values(quantizer: Quantizer, weight: Tensor, added: Tensor) -> Tensor:
        """What the layer multiplies by, from the weight and what is added to it: the rounded sum."""
        return straight_through(quantizer, weight.detach() + added)

    def added(self) -> Tensor:
        """B A."""
        return self.B @ self.A

    def forward(self, weight: Tensor) -> Tensor:
        """The values."""
        return self.values(self.quantizer, weight, self.added().view_as(weight))

    def folded(self, weight: Tensor) -> Tensor:
        """The sum."""
        return weight.detach() + self.added().view_as(weight)


class SideWeight(CompensatedWeight):
    """A rounded weight to which a sum of rank r is added."""

    stays_float = True

    @staticmethod
    def values(quantizer: Quantizer, weight: Tensor, added: Tensor) -> Tensor:
        """The sum of the rounded weight and what is added to it."""
        return cast(Tensor, quantizer(weight.detach())) + added

    def folded(self, weight: Tensor) -> Tensor:
        """The values."""
        return cast(Tensor, self(weight))

    @property
    def bits_per_weight(self) -> float:
        """That of the codes, and of A and B in 16 bits."""
        (rank, columns), rows = self.A.shape, len(self.B)
        return self.quantizer.spec.width + 16 * rank * (rows + columns) / (rows * columns)


class RequantizedWeight(SideWeight):
    """The same in training; in the end, what was added becomes a part of the weight, which is rounded."""

    stays_float = False

    def forward(self, weight: Tensor) -> Tensor:
        """The values of training or, in evaluation mode, those of the end."""
        kind = SideWeight if self.training else CompensatedWeight
        return kind.values(self.quantizer, weight, self.added().view_as(weight))

    def folded(self, weight: Tensor) -> Tensor:
        """The sum that is rounded."""
        return CompensatedWeight.folded(self, weight)


class MixedRanks(LearnedWeight):
    """A weight with all candidates at once.

    Args:
        site: the weight.
        search: the candidates, and how often each is dropped.
        kind: how what is added meets the weight.
        generator: draws, on the CPU.
    """

    def __init__(
        self, site: WeightSite, search: RankSearch, kind: type[CompensatedWeight], generator: torch.Generator
    ) -> None:
        super().__init__(site.quantizer, site.weight)
        self.ranks, self.drop_path, self.kind = list(search.candidates), search.drop_path, kind
        self.generator, weight = generator, site.weight
        self.pairs = [CompensatedWeight(site.quantizer, weight, rank, generator) for rank in self.ranks]
        self.factors = nn.ParameterList(parameter for pair in self.pairs for parameter in (pair.A, pair.B))
        self.alpha = nn.Parameter(weight.new_zeros(len(self.ranks)))
        self.alive = [True] * len(self.ranks)

    def draw(self) -> None:
        """Choose the candidates of an iteration."""
        alive = torch.rand(len(self.ranks), generator=self.generator) >= self.drop_path
        if not alive.any():
            alive[int(torch.randint(len(self.ranks), (), generator=self.generator))] = True
        self.alive = alive.tolist()

    def forward(self, weight: Tensor) -> Tensor:
        """The values of the mixture."""
        return self.kind.values(self.quantizer, weight, self.added().view_as(weight))

    def folded(self, weight: Tensor) -> Tensor:
        """The sum of weight and mixture."""
        return weight.detach() + self.added().view_as(weight)

    def added(self) -> Tensor:
        """The mixture."""
        alive = self.alive if self.training else [True] * len(self.ranks)
        alike = zip(mixture(self.alpha, alive), self.pairs, alive, strict=True)
        B, A = zip(*((share * pair.B, pair.A) for share, pair, lives in alike if lives), strict=True)
        return torch.cat(B, dim=1) @ torch.cat(A)

    @property
    def rank(self) -> int:
        """The candidate with the largest logit."""
        return self.ranks[int(self.alpha.detach().argmax())]


def mixture(alpha: Tensor, alive: Sequence[bool]) -> Tensor:
    """The shares (m,) of all candidates: the softmax of their logits, and 0 for those that are dropped."""
    dropped = ~torch.tensor(alive, device=alpha.device)
    return alpha.masked_fill(dropped, float("-inf")).softmax(0)
