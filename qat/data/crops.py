"""Random crop boxes and their replay on an image. Shapes: H, W pixels of an image, m crops of it, S their side.

The boxes have the distribution of torchvision's RandomResizedCrop. Their random numbers are a function of (seed, epoch,
index) and of nothing else, so neither the number of workers nor a resumed run changes a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import QatError
from qat.ranges import Range, check_fields

Area = Annotated[float, Range(above=0, high=1)]  # of a crop, as a fraction of its image's
Ratio = Annotated[float, Range(above=0, high=1000)]  # width / height
Probability = Annotated[float, Range(0, 1)]
TRIES = 10  # boxes that are drawn before the central fallback, as in torchvision


@dataclass(frozen=True)
class CropDistribution:
    """The distribution of crop boxes.

    Args:
        scale: lowest and highest area of a box, as a fraction of the image's area.
        ratio: lowest and highest width / height of a box; the logarithm of the ratio is uniform.
        flip: probability of a horizontal flip.

    Raises:
        QatError: a range is empty or impossible.
    """

    scale: tuple[Area, Area] = (0.08, 1.0)
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    flip: Probability = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "crop ")
        for name in ("scale", "ratio"):
            low, high = (float(v) for v in getattr(self, name))
            if low > high:
                raise QatError(f"crop {name} is {(low, high)}: give the lowest first, then the highest")
            object.__setattr__(self, name, (low, high))


@dataclass(frozen=True)
class Crop:
    """A box in pixels of its image, and whether the result is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw(distribution: CropDistribution, height: int, width: int, rng: np.random.Generator) -> Crop:
    """Draw one box inside an image of the given height and width in pixels."""
    low, high = math.log(distribution.ratio[0]), math.log(distribution.ratio[1])
    for _ in range(TRIES):
        area = height * width * rng.uniform(*distribution.scale)
        aspect = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return Crop(top, left, h, w, _flip(distribution, rng))
    return _central(distribution, height, width, _flip(distribution, rng))


def _flip(distribution: CropDistribution, rng: np.random.Generator) -> bool:
    return bool(rng.random() < distribution.flip)


def _central(distribution: CropDistribution, height: int, width: int, flip: bool) -> Crop:
    """The largest box in the centre of the image whose ratio is allowed."""
    aspect = min(max(width / height, distribution.ratio[0]), distribution.ratio[1])
    h = max(1, min(height, round(width / aspect)))
    w = max(1, min(width, round(height * aspect)))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip)


def replay(image: Tensor, crops: Sequence[Crop], size: int, interpolation: str, out: Tensor | None = None) -> Tensor:
    """Cut each crop out of an image uint8 (3, H, W), resize it and flip it; returns uint8 (m, 3, S, S).

    Boxes and flips are exact. torch's antialiased resize of integers differs from Pillow's, with which published models
    were trained, by at most 2 of 255 in a few percent of the values, and needs half of the time.

    Args:
        image: RGB pixels.
        crops: the m boxes.
        size: S.
        interpolation: nearest, bilinear or bicubic.
        out: memory for the result; new memory when it is None.
    """
    views = torch.empty(len(crops), 3, size, size, dtype=torch.uint8) if out is None else out
    for place, crop in zip(views, crops, strict=True):
        place.copy_(_view(image, crop, size, interpolation))
    return views


def _view(image: Tensor, crop: Crop, size: int, interpolation: str) -> Tensor:
    box = image[None, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if interpolation == "nearest":
        view = F.interpolate(box, (size, size), mode="nearest-exact")[0]
    else:
        view = F.interpolate(box, (size, size), mode=interpolation, antialias=True)[0]
    return view.flip(-1) if crop.flip else view
