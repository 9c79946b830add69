"""From an index to views of an image, and from views to a batch. Shapes: B views in a batch, m per image, S side.

An image that cannot be read is reported, not raised: an exception in a worker reaches the user as a traceback without
the path, so the worker hands the message over and the main process decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.crops import CropLaw, draw, replay, rng_for, to_tensor
from qat.losses import TopK
from qat.preprocessing import Preprocessing

View = Callable[[Image.Image, int], Tensor]  # RGB image and its index -> uint8 (m, 3, S, S)


class Sample(NamedTuple):
    """What a worker makes of one index: views of it, or of its substitute, and a message per unreadable file."""

    views: Tensor | None  # (m, 3, S, S) uint8
    label: int
    path: str
    bad: tuple[str, ...]


class Batch(NamedTuple):
    """What a step gets; an evaluation batch can be empty (B = 0) when bad images are skipped.

    The m crops of an image are neighbours, so row i belongs to ``paths[i // m]``.
    """

    images: Tensor  # (B, 3, S, S) uint8
    labels: Tensor  # (B,) int64, -1 when unknown (prediction)
    paths: tuple[str, ...]  # one per image, relative to its folder
    bad: tuple[str, ...]  # one message for every file of this batch that could not be read
    soft_labels: TopK | None = None  # replace the labels in the loss


@dataclass(frozen=True)
class EvalView:
    """Short side to ``preprocessing.resize``, then the centre: uint8 (1, 3, S, S)."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        """The view of one RGB image; its index does not matter."""
        size, short = self.preprocessing.size, min(image.size)
        width, height = (int(self.preprocessing.resize * side / short) for side in image.size)  # truncates: torchvision
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.resize((width, height), resample_of(self.preprocessing.interpolation))
        return to_tensor(resized.crop((left, top, left + size, top + size))).unsqueeze(0)


@dataclass(frozen=True)
class CropView:
    """Random crops drawn from (seed, epoch, index) alone: uint8 (m, 3, S, S), m being ``crops``."""

    law: CropLaw
    size: int
    resample: Image.Resampling
    crops: int
    seed: int
    epoch: int

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        """The m crops of one RGB image."""
        rng = rng_for(self.seed, self.epoch, index)
        boxes = [draw(self.law, image.height, image.width, rng) for _ in range(self.crops)]
        return torch.stack([replay(image, box, self.size, self.resample) for box in boxes])


class Images(Dataset[Sample]):
    """Samples of the listed images.

    Args:
        folder: what the paths are relative to.
        paths: images; the first part of a path names the class.
        labels: class name to label; a class that is not in it gets -1.
        view: what is made of a decoded image.
        tries: files tried for one sample, the one asked for and those that follow it in the list.
    """

    def __init__(self, folder: Path, paths: Sequence[str], labels: Mapping[str, int], view: View, tries: int = 1):
        self.folder, self.paths, self.labels = folder, paths, labels
        self.view, self.tries = view, min(tries, len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Each file is decoded once, however many views are made of it."""
        bad: list[str] = []
        for offset in range(self.tries):
            path = self.paths[(index + offset) % len(self.paths)]
            try:
                image = load(self.folder / path)
            except Exception as error:  # Pillow has no common base: OSError, SyntaxError, ValueError, ...
                bad.append(f"{self.folder / path}: {reason(error)}")
                continue
            return Sample(self.view(image, index), self.labels.get(path.partition("/")[0], -1), path, tuple(bad))
        return Sample(None, -1, self.paths[index], tuple(bad))


def resample_of(interpolation: str) -> Image.Resampling:
    """Pillow's filter of this name: ``nearest``, ``bilinear`` or ``bicubic``."""
    return Image.Resampling[interpolation.upper()]


def load(path: Path) -> Image.Image:
    """Decoded RGB image, as stored: the orientation in EXIF is ignored, as in every published ImageNet result."""
    with Image.open(path) as image:
        return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why an image could not be read, in one line and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Collate:
    """Samples to a batch; those without views leave only their messages, and all of them may be so."""

    size: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of these samples."""
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        views = [s.views for s in samples if s.views is not None]
        labels = [s.label for s in samples if s.views is not None for _ in range(len(s.views))]
        return Batch(
            torch.cat(views) if views else empty,  # n images of (m, 3, S, S) -> (n*m, 3, S, S)
            torch.tensor(labels, dtype=torch.int64),
            tuple(s.path for s in samples if s.views is not None),
            tuple(message for s in samples for message in s.bad),
        )


class Loader(DataLoader[Sample]):
    """Counts as resumable for Lightning, which warns otherwise; the data module's own state says where to go on."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""
