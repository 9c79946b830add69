"""From an index to views of an image, and from views to a batch.

Shapes: B views in a batch, m per image, S their side; H, W pixels of an image.

An image that cannot be read is reported, not raised: an exception in a worker reaches the user as a traceback without
the path, so the worker hands the message over and the main process decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.crops import CropLaw, draw, replay, rng_for
from qat.data.decode import decode, reason, to_image, to_tensor
from qat.errors import QatError
from qat.losses import TopK
from qat.preprocessing import Preprocessing


class Views(NamedTuple):
    """What is made of one image."""

    images: Tensor  # (m, 3, S, S) uint8
    soft_labels: TopK | None = None


View = Callable[[Tensor, int], Views]  # RGB image uint8 (3, H, W) and its index


class Sample(NamedTuple):
    """What a worker makes of one index: views of it, or of its substitute, and a message per unreadable file."""

    views: Views | None
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
    """Short side to ``preprocessing.resize``, then the centre: one view, with Pillow, as published results have it."""

    preprocessing: Preprocessing

    def __call__(self, pixels: Tensor, index: int) -> Views:
        """The view of one RGB image; its index does not matter."""
        image = to_image(pixels)
        size, short = self.preprocessing.size, min(image.size)
        width, height = (int(self.preprocessing.resize * side / short) for side in image.size)  # truncates: torchvision
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.resize((width, height), Image.Resampling[self.preprocessing.interpolation.upper()])
        return Views(to_tensor(resized.crop((left, top, left + size, top + size))).unsqueeze(0).contiguous())


@dataclass(frozen=True)
class CropView:
    """Random crops drawn from (seed, epoch, index) alone, m being ``crops``."""

    law: CropLaw
    size: int
    interpolation: str
    crops: int
    seed: int
    epoch: int

    def __call__(self, image: Tensor, index: int) -> Views:
        """The m crops of one RGB image."""
        rng, (_, height, width) = rng_for(self.seed, self.epoch, index), image.shape
        crops = [draw(self.law, height, width, rng) for _ in range(self.crops)]
        return Views(replay(image, crops, self.size, self.interpolation))


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
        for place in ((index + offset) % len(self.paths) for offset in range(self.tries)):
            path = self.paths[place]
            try:
                image = decode(self.folder / path)
            except Exception as error:  # Pillow has no common base: OSError, SyntaxError, ValueError, ...
                bad.append(f"{self.folder / path}: {reason(error)}")
                continue
            try:
                views = self.view(image, place)
            except QatError as error:  # soft labels of another image
                bad.append(f"{self.folder / path}: {error}")
                continue
            return Sample(views, self.labels.get(path.partition("/")[0], -1), path, tuple(bad))
        return Sample(None, -1, self.paths[index], tuple(bad))


@dataclass(frozen=True)
class Collate:
    """Samples to a batch; those without views leave only their messages, and all of them may be so."""

    size: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of these samples."""
        good = [(s, s.views) for s in samples if s.views is not None]
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        soft = [views.soft_labels for _, views in good if views.soft_labels is not None]
        return Batch(
            torch.cat([views.images for _, views in good]) if good else empty,  # n images of (m, 3, S, S) -> (B, ...)
            torch.tensor([s.label for s, views in good for _ in range(len(views.images))], dtype=torch.int64),
            tuple(s.path for s, _ in good),
            tuple(message for s in samples for message in s.bad),
            TopK(*(torch.cat(parts) for parts in zip(*soft, strict=True))) if soft else None,
        )


class Loader(DataLoader[Sample]):
    """Counts as resumable for Lightning, which warns otherwise; the data module's own state says where to go on."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""
