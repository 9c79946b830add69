"""The batches of crops that a teacher labels; each image is decoded once.

Images are grouped into blocks by their place in the list: as many images as fill a batch, or one image whose crops fill
several batches. Shapes: M crops of an image, b crops in a batch, S their side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from qat.data.crops import Crop, CropDistribution, draw, replay
from qat.data.decode import decode, new_images, reason
from qat.data.softlabels.store import LARGEST
from qat.data.source import Source
from qat.data.streams import rng_for


class CroppedImage(NamedTuple):
    """An image and its crops, still without labels."""

    number: int  # place of the image in the list
    boxes: Tensor  # (M, 4) int64: top, left, height, width
    flips: Tensor  # (M,) bool
    image_size: tuple[int, int]  # height, width
    bad: str  # path and reason if it cannot be read; its crops are black then, so that the batch keeps its shape


class TeacherBatch(NamedTuple):
    """The crops of a block that the teacher labels in one forward pass."""

    crops: Tensor  # (b, 3, S, S) uint8
    block: int
    images: tuple[CroppedImage, ...]  # the images of the block in its last batch; empty in those before


@dataclass(frozen=True, eq=False)
class TeacherBatches(IterableDataset[TeacherBatch]):
    """Yields the batches of the given blocks, in order; the workers of a loader share the blocks.

    Args:
        source: all images.
        blocks: numbers of the blocks to yield.
        distribution: of the crops.
        num_crops: M.
        batch_size: the largest b.
        size: S.
        interpolation: how crops are resized.
        seed: fixes the crops, together with the number of the image.
    """

    source: Source
    blocks: Sequence[int]
    distribution: CropDistribution
    num_crops: int
    batch_size: int
    size: int
    interpolation: str
    seed: int

    def __iter__(self) -> Iterator[TeacherBatch]:
        worker = get_worker_info()
        mine = self.blocks[worker.id :: worker.num_workers] if worker else self.blocks
        for block in mine:
            yield from self.batches(block)

    def batches(self, block: int) -> Iterator[TeacherBatch]:
        """Yield the batches of one block; crops are resized when their batch is made."""
        numbers = images_of_block(block, len(self.source), self.num_crops, self.batch_size)
        images = [self._image(number) for number in numbers]
        crops = [(pixels, crop) for pixels, drawn, _ in images for crop in drawn]
        for start in range(0, len(crops), self.batch_size):
            some = crops[start : start + self.batch_size]
            batch = new_images(len(some), self.size)
            for place, (pixels, crop) in enumerate(some):
                replay(pixels, [crop], self.size, self.interpolation, batch[place : place + 1])
            last = start + self.batch_size >= len(crops)
            yield TeacherBatch(batch, block, tuple(image for *_, image in images) if last else ())

    def _image(self, number: int) -> tuple[Tensor, list[Crop], CroppedImage]:
        """The pixels uint8 (3, H, W) of an image, its crops, and the record of both."""
        bad = ""
        try:
            pixels = decode(self.source.open(number))
            if max(pixels.shape) > LARGEST:
                raise ValueError(f"{pixels.shape[2]} x {pixels.shape[1]} pixels, sides can have at most {LARGEST}")
        except Exception as error:  # Pillow has no common base
            pixels, bad = torch.zeros(3, 8, 8, dtype=torch.uint8), f"{self.source.path(number)}: {reason(error)}"
        _, height, width = pixels.shape
        rng = rng_for(self.seed, 0, number)
        drawn = [draw(self.distribution, height, width, rng) for _ in range(self.num_crops)]
        boxes = torch.tensor([[c.top, c.left, c.height, c.width] for c in drawn])
        flips = torch.tensor([c.flip for c in drawn])
        return pixels, drawn, CroppedImage(number, boxes, flips, (height, width), bad)


def images_of_block(block: int, images: int, crops: int, batch_size: int) -> range:
    """Numbers of the images in a block.

    Args:
        block: number of the block.
        images: how many images there are.
        crops: M.
        batch_size: the largest b.
    """
    size = images_per_block(crops, batch_size)
    return range(block * size, min((block + 1) * size, images))


def images_per_block(crops: int, batch_size: int) -> int:
    """How many images a block has: as many as fill a batch, at least one."""
    return max(1, batch_size // crops)
