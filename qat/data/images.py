"""From image files to batches. Shapes: B views in a batch, m per image, S their side; H, W pixels of an image.

A worker makes whole batches and writes every view to its place in memory that it shares with the main process: each
pixel is copied once. An image that cannot be read is reported, not raised: an exception in a worker reaches the user as
a traceback without the path, so the worker hands the message over and the main process decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.crops import CropLaw, draw, replay
from qat.data.decode import decode, new_images, reason, to_image, to_tensor
from qat.data.streams import rng_for
from qat.errors import QatError
from qat.preprocessing import Preprocessing


class TopK(NamedTuple):
    """Sparse soft labels: the rest of the probability is spread evenly over the other classes (marginal smoothing)."""

    classes: Tensor  # (B, k) int64
    probs: Tensor  # (B, k), a row sums to at most 1


class View(Protocol):
    """What is made of one image."""

    @property
    def count(self) -> int:
        """m."""

    @property
    def size(self) -> int:
        """S."""

    def __call__(self, image: Tensor, index: int, out: Tensor) -> TopK | None:
        """Write the views of an RGB image uint8 (3, H, W) to ``out`` (m, 3, S, S); their soft labels, if any."""


class Batch(NamedTuple):
    """What a step gets; an evaluation batch can be empty (B = 0) when bad images are skipped.

    The m crops of an image are neighbours, so row i belongs to ``paths[i // m]``.
    """

    images: Tensor  # (B, 3, S, S) uint8
    labels: Tensor  # (B,) int64, -1 when unknown (prediction)
    paths: tuple[str, ...]  # one per image, relative to its folder
    bad: tuple[str, ...]  # one message for every file of this batch that could not be read
    soft_labels: TopK | None = None  # replace the labels in the loss
    fatal: str = ""  # what stops the run, whatever is done about bad images


@dataclass(frozen=True)
class EvalView:
    """Short side to ``preprocessing.resize``, then the centre: one view, with Pillow, as published results have it."""

    preprocessing: Preprocessing
    count = 1

    @property
    def size(self) -> int:
        """S."""
        return self.preprocessing.size

    def __call__(self, image: Tensor, index: int, out: Tensor) -> None:
        """Write the view of one RGB image; its index does not matter."""
        whole, size = to_image(image), self.preprocessing.size
        short = min(whole.size)
        width, height = (int(self.preprocessing.resize * side / short) for side in whole.size)  # truncates: torchvision
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = whole.resize((width, height), Image.Resampling[self.preprocessing.interpolation.upper()])
        out[0] = to_tensor(resized.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class CropView:
    """Random crops drawn from (seed, epoch, index) alone, m being ``count``."""

    law: CropLaw
    size: int
    interpolation: str
    count: int
    seed: int
    epoch: int

    def __call__(self, image: Tensor, index: int, out: Tensor) -> None:
        """Write the m crops of one RGB image."""
        rng, (_, height, width) = rng_for(self.seed, self.epoch, index), image.shape
        crops = [draw(self.law, height, width, rng) for _ in range(self.count)]
        replay(image, crops, self.size, self.interpolation, out)


class Images(Dataset[Batch]):
    """Batches of the listed images; each file is decoded once for all of its views.

    Args:
        folder: what the paths are relative to.
        paths: images; the first part of a path names the class.
        labels: class name to label; a class that is not in it gets -1.
        view: what is made of a decoded image.
        tries: files tried for one index, the one asked for and those that follow it in the list.
    """

    def __init__(self, folder: Path, paths: Sequence[str], labels: Mapping[str, int], view: View, tries: int = 1):
        self.folder, self.paths, self.labels = folder, paths, labels
        self.view, self.tries = view, min(tries, len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these indices; of what cannot be read, or must not be trained on, only a message."""
        try:
            return self._batch(indices)
        except QatError as error:
            return Batch(new_images(0, self.view.size), torch.empty(0, dtype=torch.int64), (), (), fatal=str(error))

    def _batch(self, indices: Sequence[int]) -> Batch:
        m, S = self.view.count, self.view.size
        images = new_images(len(indices) * m, S)
        paths: list[str] = []
        soft: list[TopK] = []
        bad: list[str] = []
        for index in indices:
            for place in ((index + offset) % len(self.paths) for offset in range(self.tries)):
                path = self.folder / self.paths[place]
                try:
                    image = decode(path)
                except Exception as error:  # Pillow has no common base: OSError, SyntaxError, ValueError, ...
                    bad.append(f"{path}: {reason(error)}")
                    continue
                labels = self._views(image, place, images[len(paths) * m :][:m])
                paths.append(self.paths[place])
                soft += [] if labels is None else [labels]
                break
        numbers = torch.tensor([self.labels.get(path.partition("/")[0], -1) for path in paths], dtype=torch.int64)
        stored = TopK(*(torch.cat(parts) for parts in zip(*soft, strict=True))) if soft else None
        return Batch(images[: len(paths) * m], numbers.repeat_interleave(m), tuple(paths), tuple(bad), stored)

    def _views(self, image: Tensor, place: int, out: Tensor) -> TopK | None:
        """QatError with the path when an image has labels of another one."""
        try:
            return self.view(image, place, out)
        except QatError as error:
            raise QatError(f"{self.folder / self.paths[place]}: {error}") from None


def as_it_is(batch: Batch) -> Batch:
    """In place of collation: `Images` makes whole batches."""
    return batch


class Loader(DataLoader[Batch]):
    """Counts as resumable for Lightning, which warns otherwise; the data module's own state says where to go on."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""
