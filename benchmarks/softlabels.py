"""Soft labels: reads per second, bytes per crop, and the input pipeline against plain ImageFolder.

    python benchmarks/softlabels.py [--root DIR]

--root: a folder with train/<class>/*.JPEG; without it, 400 generated images of 500 x 375 pixels are used.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from qat.data.crops import CropDistribution, draw
from qat.data.folder import class_names, find_images
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.data.softlabels.reader import SoftLabels
from qat.data.softlabels.replay import next_crops, recover
from qat.data.softlabels.store import Header, ImageLabels, create, sha256_of
from qat.data.softlabels.writer import Writer
from qat.data.streams import rng_for

ROWS, CROPS, TOP_K, CLASSES = 20_000, 500, 5, 1_000
READS, WORKERS, RUNS, BATCH, PASSES = 20_000, 2, 5, 64, 2
TRAINING_CROPS = CropDistribution((0.08, 0.936))
PREPROCESSING = {"size": 224, "resize": 256, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


def header(paths: list[str], classes: list[str], crops: int) -> Header:
    """The header of a store whose labels no teacher has made."""
    return Header(
        teacher="none", teacher_sha256="", teacher_input_size=224, teacher_interpolation="bicubic", mean=(0.5,) * 3,
        std=(0.5,) * 3, temperature=1.0, label_type="marginal_smoothing", top_k=TOP_K, num_crops=crops,
        num_classes=len(classes), crop_scale=TRAINING_CROPS.scale, crop_ratio=TRAINING_CROPS.ratio,
        flip_p=TRAINING_CROPS.flip, seed=0, batch_size=1,
        precision="none", split="train", class_list_sha256=sha256_of(classes), path_list_sha256=sha256_of(paths),
    )  # fmt: skip


def random_labels(height: int, width: int, crops: int, classes: int, rng: np.random.Generator) -> ImageLabels:
    """Boxes as they are drawn for training, with random labels."""
    drawn = [draw(TRAINING_CROPS, height, width, rng) for _ in range(crops)]
    boxes = np.array([[c.top, c.left, c.height, c.width] for c in drawn], np.uint16)
    names = np.stack([rng.permutation(classes)[:TOP_K] for _ in range(crops)]).astype(np.uint16)
    probs = -np.sort(-rng.dirichlet(np.ones(TOP_K + 1), crops))[:, :TOP_K]
    return ImageLabels(boxes, np.array([c.flip for c in drawn]), names, probs.astype(np.float16), (height, width))


def large_store(path: Path) -> None:
    """A store of 20,000 images with 500 crops each; every image has the same labels."""
    classes = [f"n{i:08d}" for i in range(CLASSES)]
    paths = sorted(f"{classes[i % CLASSES]}/{classes[i % CLASSES]}_{i:05d}.JPEG" for i in range(ROWS))
    create(path, header(paths, classes, CROPS), paths, classes, "benchmark")
    crops, flips = random_labels(375, 500, CROPS, CLASSES, np.random.default_rng(0)).packed()
    with h5py.File(path, "r+") as file:
        for start in range(0, ROWS, 1_000):
            file["crops"][start : start + 1_000] = np.broadcast_to(crops, (1_000, *crops.shape))
            file["flip"][start : start + 1_000] = np.broadcast_to(flips, (1_000, *flips.shape))
        file["image_size"][...] = (375, 500)
        file["done"][...] = 1


def read_rows(path: Path, seed: int) -> float:
    """Seconds per image to choose the next four crops, read their labels and recover them."""
    labels = SoftLabels(path)
    order = np.random.default_rng(seed).integers(ROWS, size=READS).tolist()
    start = time.perf_counter()
    for index in order:
        some = labels.read(index, next_crops(0, index, CROPS, 8, 4))
        recover(labels.header, some.classes, some.probs)
    return (time.perf_counter() - start) / READS


def read_rows_of(arguments: tuple[Path, int]) -> float:
    """`read_rows` in a worker, with one thread."""
    torch.set_num_threads(1)
    return read_rows(*arguments)


def generated(root: Path, count: int = 400) -> None:
    """Smooth noise with a fine grain, about 90 kB each, as large as an average image of ImageNet."""
    rng = np.random.default_rng(0)
    for i in range(count + 8):
        path = root / ("train" if i < count else "val") / f"c{i % 8}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        grain = rng.normal(0, 12, (375, 500, 1))
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(path, quality=90)


def small_store(path: Path, root: Path, crops: int = 16) -> None:
    """A store with random labels of the images below ``root``."""
    paths, classes = list(find_images(root / "train")), class_names(root / "train")
    create(path, header(paths, classes, crops), paths, classes, "benchmark")
    with Writer(path) as writer:
        for index, name in enumerate(paths):
            with Image.open(root / "train" / name) as image:
                writer.put(index, random_labels(image.height, image.width, crops, len(classes), rng_for(0, 0, index)))


def ours(root: Path, labels: Path, crops: int) -> Callable[[], Iterator[int]]:
    """Crops per batch of our pipeline."""
    data = ImageNetDataModule(
        DataOptions(
            root, batch_size=BATCH, crops_per_image=crops, softlabels=labels, workers=WORKERS,
            preprocessing=PREPROCESSING,
        )
    )  # fmt: skip
    return lambda: (len(batch.images) for _ in range(PASSES) for batch in data.train_dataloader())  # type: ignore[attr-defined]


def plain(root: Path) -> Callable[[], Iterator[int]]:
    """Crops per batch of torchvision: one crop per decoded image, not even normalized."""
    steps = [
        transforms.RandomResizedCrop(224, TRAINING_CROPS.scale),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    images = ImageFolder(str(root / "train"), transforms.Compose(steps))
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS)
    return lambda: (len(batch) for _ in range(PASSES) for batch, _ in loader)


def rates(pipelines: dict[str, Callable[[], Iterator[int]]]) -> dict[str, float]:
    """Median crops per second of alternating runs."""
    found: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(RUNS + 1):
        for name, batches in pipelines.items():
            start = time.perf_counter()
            crops = sum(batches())
            if turn:  # the first fills the file cache
                found[name].append(crops / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, help="folder with train/<class>/*.JPEG")
    root = parser.parse_args().root
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        large_store(folder / "large.h5")
        print(f"bytes per crop: {(folder / 'large.h5').stat().st_size / ROWS / CROPS:.2f}")
        read_rows(folder / "large.h5", 9)
        with get_context("spawn").Pool(WORKERS) as pool:
            jobs = [(folder / "large.h5", seed) for seed in range(WORKERS)]
            times = [max(pool.map(read_rows_of, jobs)) for _ in range(RUNS)]
        each = statistics.median(times)
        print(f"label reads: {1e6 * each:.1f} us per image, {WORKERS / each:.0f} images/s with {WORKERS} workers")
        if root is None:
            generated(folder)
        root = root or folder
        small_store(folder / "small.h5", root)
        found = rates({
            "ImageFolder + RandomResizedCrop": plain(root),
            "1 crop per image": ours(root, folder / "small.h5", 1),
            "4 crops per image": ours(root, folder / "small.h5", 4),
        })  # fmt: skip
        base = next(iter(found.values()))
        for name, rate in found.items():
            print(f"{name}: {rate:.0f} crops/s, {rate / base:.2f} x plain")


if __name__ == "__main__":
    main()
