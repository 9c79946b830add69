"""The crops of every image for a teacher; each image is decoded once.

Shapes: M crops of an image, b in a batch, S their side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from qat.data.crops import Crop, CropLaw, draw, replay
from qat.data.decode import decode, new_images, reason
from qat.data.softlabels.store import LARGEST
from qat.data.streams import rng_for


class Source(NamedTuple):
    """An image of a block: what is known of it before the teacher has seen it."""

    number: int
    boxes: Tensor  # (M, 4) int64: top, left, height, width
    flips: Tensor  # (M,) bool
    image_size: tuple[int, int]
    bad: str  # why it cannot be read; its crops are black then, so that the batch keeps its shape


class Piece(NamedTuple):
    """One forward of the teacher: some crops of a block."""

    images: Tensor  # (b, 3, S, S) uint8
    block: int
    sources: tuple[Source, ...]  # of the whole block, with its last piece


@dataclass(frozen=True, eq=False)
class Blocks(IterableDataset[Piece]):
    """The pieces of the given blocks, in order; the workers of a loader share the blocks.

    A block has as many images as fill a batch, or one image whose crops fill several.

    Args:
        folder: what the paths are relative to.
        paths: all images.
        blocks: numbers of the blocks to give.
        law: of the crops.
        crops: M.
        batch_size: the largest b.
        size: S.
        interpolation: how crops are resized.
        seed: with the number of an image, fixes its crops.
    """

    folder: Path
    paths: Sequence[str]
    blocks: Sequence[int]
    law: CropLaw
    crops: int
    batch_size: int
    size: int
    interpolation: str
    seed: int

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        mine = self.blocks[worker.id :: worker.num_workers] if worker else self.blocks
        for block in mine:
            yield from self.pieces(block)

    def pieces(self, block: int) -> Iterator[Piece]:
        """The batches of one block; crops are made as they are needed."""
        images = [self._image(index) for index in images_of(block, len(self.paths), self.crops, self.batch_size)]
        crops = [(pixels, crop) for pixels, drawn, _ in images for crop in drawn]
        for start in range(0, len(crops), self.batch_size):
            some = crops[start : start + self.batch_size]
            batch = new_images(len(some), self.size)
            for place, (pixels, crop) in enumerate(some):
                replay(pixels, [crop], self.size, self.interpolation, batch[place : place + 1])
            last = start + self.batch_size >= len(crops)
            yield Piece(batch, block, tuple(source for *_, source in images) if last else ())

    def _image(self, index: int) -> tuple[Tensor, list[Crop], Source]:
        path, bad = self.folder / self.paths[index], ""
        try:
            pixels = decode(path)
            if max(pixels.shape) > LARGEST:
                raise ValueError(f"{pixels.shape[2]} x {pixels.shape[1]} pixels, sides can have at most {LARGEST}")
        except Exception as error:  # Pillow has no common base
            pixels, bad = torch.zeros(3, 8, 8, dtype=torch.uint8), f"{path}: {reason(error)}"
        _, height, width = pixels.shape
        rng = rng_for(self.seed, 0, index)
        drawn = [draw(self.law, height, width, rng) for _ in range(self.crops)]
        boxes = torch.tensor([[c.top, c.left, c.height, c.width] for c in drawn])
        flips = torch.tensor([c.flip for c in drawn])
        return pixels, drawn, Source(index, boxes, flips, (height, width), bad)


def images_of(block: int, images: int, crops: int, batch_size: int) -> range:
    """Numbers of the images of a block."""
    size = images_per_block(crops, batch_size)
    return range(block * size, min((block + 1) * size, images))


def images_per_block(crops: int, batch_size: int) -> int:
    """As many as fill a batch, at least one."""
    return max(1, batch_size // crops)
