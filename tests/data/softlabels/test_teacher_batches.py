"""The teacher's batches have every crop once, and their content depends on the place in the list alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qat.data.crops import CropDistribution, draw, replay
from qat.data.decode import decode
from qat.data.softlabels.teacher_batches import TeacherBatch, TeacherBatches, images_of_block
from qat.data.source import Source
from qat.data.streams import rng_for

CROPS = CropDistribution((0.2, 0.9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def teacher_batches(folder: Path, numbers: list[int], crops: int, batch_size: int) -> TeacherBatches:
    source = Source(folder, [f"{i}.png" for i in range(5)])
    return TeacherBatches(source, numbers, CROPS, crops, batch_size, 8, "bicubic", 3)


@pytest.mark.parametrize(
    ("crops", "batch_size", "sizes"),
    [(4, 8, [8, 8, 4]), (4, 9, [8, 8, 4]), (7, 3, [3, 3, 1] * 5), (4, 4, [4] * 5), (1, 64, [5])],
)
def test_every_crop_comes_once_in_batches_fixed_by_the_list(
    folder: Path, crops: int, batch_size: int, sizes: list[int]
) -> None:
    number = -(-5 // max(1, batch_size // crops))
    found = list(teacher_batches(folder, list(range(number)), crops, batch_size))
    assert [len(batch.crops) for batch in found] == sizes
    images = [image for batch in found for image in batch.images]
    assert [image.number for image in images] == [0, 1, 2, 3, 4]
    views = torch.cat([batch.crops for batch in found]).split(crops)
    for number, (view, image) in enumerate(zip(views, images, strict=True)):
        rng = rng_for(3, 0, number)
        drawn = [draw(CROPS, 20 + number, 30, rng) for _ in range(crops)]
        assert torch.equal(view, replay(decode(folder / f"{number}.png"), drawn, 8, "bicubic"))
        assert image.boxes.tolist() == [[c.top, c.left, c.height, c.width] for c in drawn]
        assert image.flips.tolist() == [c.flip for c in drawn]
        assert (image.image_size, image.bad) == ((20 + number, 30), "")


def by_block(found: list[TeacherBatch]) -> dict[int, torch.Tensor]:
    return {n: torch.cat([p.crops for p in found if p.block == n]) for n in {p.block for p in found}}


def test_blocks_are_the_same_alone_and_from_several_workers(folder: Path) -> None:
    whole = by_block(list(teacher_batches(folder, [0, 1, 2], 4, 8)))
    some = by_block(list(DataLoader(teacher_batches(folder, [2, 0, 1], 4, 8), batch_size=None, num_workers=2)))
    alone = by_block(list(teacher_batches(folder, [1], 4, 8)))
    assert all(torch.equal(whole[n], some[n]) for n in whole)
    assert torch.equal(whole[1], alone[1])
    assert images_of_block(2, 5, 4, 8) == range(4, 5)


def test_an_unreadable_image_is_reported_and_changes_no_other_crop(folder: Path) -> None:
    whole = by_block(list(teacher_batches(folder, [0], 4, 8)))[0]
    (folder / "1.png").write_text("<html>")
    (batch,) = teacher_batches(folder, [0], 4, 8)
    assert [image.bad for image in batch.images] == ["", f"{folder / '1.png'}: not an image"]
    assert torch.equal(batch.crops[:4], whole[:4])
    assert not batch.crops[4:].any()
