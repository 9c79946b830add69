"""A store of soft labels made by hand. Shapes: N images, M crops, k classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.data.softlabels.store import Header, ImageLabels, create, sha256_of
from qat.data.softlabels.writer import Writer

PATHS = [f"{'ab'[i // 5]}/{'é' * (i % 3)}{i}.JPEG" for i in range(10)]
CLASSES = ["a", "b", "c"]


def header(paths: Sequence[str] = PATHS, classes: Sequence[str] = CLASSES, **changes: Any) -> Header:
    """Of a store of these images."""
    values: dict[str, Any] = {
        "teacher": "deit_tiny_patch16_224", "teacher_sha256": "0" * 64, "teacher_input_size": 224,
        "teacher_interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.5), "temperature": 1.0,
        "label_type": "marginal_smoothing", "top_k": 2, "num_crops": 11, "num_classes": len(classes),
        "crop_scale": (0.08, 0.936), "crop_ratio": (0.75, 4 / 3), "flip_p": 0.5, "seed": 0, "batch_size": 4,
        "precision": "32-true", "split": "train",
    }  # fmt: skip
    values |= {"class_list_sha256": sha256_of(classes), "path_list_sha256": sha256_of(paths)}
    return Header(**{**values, **changes})


def labels_of(index: int, made: Header, image_size: tuple[int, int] = (40, 44)) -> ImageLabels:
    """Labels that differ from image to image."""
    rng = np.random.default_rng(index)
    crops, k = made.num_crops, made.top_k
    starts, sides = rng.integers(0, 20, (crops, 2)), rng.integers(1, 20, (crops, 2))
    probs = -np.sort(-rng.dirichlet(np.ones(made.num_classes), crops))[:, :k]
    classes = np.stack([rng.permutation(made.num_classes)[:k] for _ in range(crops)])
    return ImageLabels(
        np.concatenate([starts, sides], 1).astype(np.uint16), rng.random(crops) < 0.5, classes.astype(np.uint16),
        probs.astype(np.float16), image_size,
    )  # fmt: skip


def write(
    path: Path,
    rows: Sequence[int] | None = None,
    paths: Sequence[str] = PATHS,
    classes: Sequence[str] = CLASSES,
    sizes: Sequence[tuple[int, int]] | None = None,
    **changes: Any,
) -> Header:
    """A store of all images, or with labels for some ``rows``."""
    made = header(paths, classes, **changes)
    create(path, made, paths, classes, "tests")
    with Writer(path) as writer:
        for index in range(len(paths)) if rows is None else rows:
            writer.put(index, labels_of(index, made, sizes[index] if sizes else (40, 44)))
    return made
