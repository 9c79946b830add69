"""Batches on their way to a GPU."""

from __future__ import annotations

import torch

from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from tests.gpu.callbacks import set_wait_mode

PREPROCESSING = {"size": 32, "resize": 36, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


def batches(images, labels, workers: int):
    """The training loader of the tiny images, with soft labels."""
    data = ImageNetDataModule(
        DataOptions(images, batch_size=8, softlabels=labels, workers=workers, preprocessing=PREPROCESSING, seed=0)
    )
    return list(data.train_dataloader())


def test_batches_are_pinned_and_reach_the_gpu_without_a_wait(gpu, images, softlabels):
    for workers in (0, 2):
        for batch in batches(images, softlabels, workers):
            tensors = [batch.images, batch.labels, *batch.soft_labels]
            assert all(tensor.is_pinned() for tensor in tensors)
            set_wait_mode("error")
            there = batch.to(gpu, non_blocking=True)
            set_wait_mode("default")
            moved = [there.images, there.labels, *there.soft_labels]
            assert all(tensor.device.type == "cuda" for tensor in moved)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(tensors, moved, strict=True))


def test_the_batches_of_this_file_have_soft_labels(images, softlabels):
    for batch in batches(images, softlabels, 0):
        assert len(batch.images) == len(batch.labels) == len(batch.soft_labels.classes)
