"""Easy images first: the curriculum of AIQViT (AAAI 2025, arXiv 2502.04628), equations 16 and 17.

At iteration t of T, a unit is trained on the ceil(share(t) * n) images with the smallest loss, where

    share(t) = min(1, start + (1 - start) * t / T)

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Annotated

import torch
from torch import Tensor

from qat.ranges import Range, check_fields


@dataclass
class Curriculum:
    """How fast the images come in.

    Args:
        start: share of the images at the start.
        refresh: iterations between two rankings of the images by their present loss; 0 ranks them once.
    """

    start: Annotated[float, Range(above=0, high=1)] = 0.5
    refresh: Annotated[int, Range(0, 10_000_000)] = 500

    def __post_init__(self) -> None:
        check_fields(self)

    def count(self, t: int, iterations: int, images: int) -> int:
        """How many images take part, exactly: in floating point, a ceiling could be one too high."""
        start = Fraction(str(self.start))
        return min(images, ceil((start + (1 - start) * Fraction(t, iterations)) * images))


class Ranking:
    """The images that take part.

    Args:
        curriculum: how many.
        iterations: T.
        images: indices (n,) of all of them.
        losses: gives the present loss of every one (n,).
    """

    def __init__(
        self, curriculum: Curriculum, iterations: int, images: Tensor, losses: Callable[[Tensor], Tensor]
    ) -> None:
        self.curriculum, self.iterations, self.images, self.losses = curriculum, iterations, images, losses
        self.order = images

    def at(self, t: int) -> Tensor:
        """The indices at iteration t; of equal losses, the first image is the easier one."""
        refresh = self.curriculum.refresh
        if t == 0 or (refresh and t % refresh == 0):
            self.order = self.images[torch.argsort(self.losses(self.images).cpu(), stable=True)]
        return self.order[: self.curriculum.count(t, self.iterations, len(self.images))]
