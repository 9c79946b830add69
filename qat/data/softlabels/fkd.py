"""Soft labels of FKD, a file per image, as rows of a store.

Shapes: M crops of an image, k stored classes per crop, C classes; H, W pixels of the image. A file is a pickled list of
three arrays: boxes (M, 4) as top / H, left / W, height / H, width / W in float32 or float16; flips (M,); labels, whose
class numbers are floats too. The shape of the labels goes with the label type of the set:

    hard                                 (M,) or (M, 1)        the most probable class
    smoothing                            (M, 2)                that class, its probability
    marginal_smoothing_k5, _k10          (M, 2, 5), (M, 2, 10) classes, their probabilities
    marginal_renorm, marginal_renorm_k5  (M, 2, 5)             the same
    ori                                  (M, C)                probabilities of all classes
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from qat.data.decode import reason
from qat.data.softlabels.store import HARD, LARGEST, MARGINAL_RENORM, MARGINAL_SMOOTHING, Row
from qat.errors import QatError, first_line

FOLDERS = ("imagenet/train", "train", "")  # of the classes, below the folder of a set
SUFFIX = ".tar"  # no archive, whatever its name
TOO_MUCH = 1.01  # for a sum of probabilities; those in half precision exceed 1 by less
HALF = 2048  # up to here half precision has every integer

Array = npt.NDArray[Any]


def _alone(labels: Array, classes: int) -> tuple[Array, Array]:
    found = labels.reshape(len(labels), 1)
    return found, np.ones(found.shape)


def _pairs(labels: Array, classes: int) -> tuple[Array, Array]:
    pairs = labels.reshape(len(labels), 2, -1)
    return pairs[:, 0], pairs[:, 1]


def _all(labels: Array, classes: int) -> tuple[Array, Array]:
    return np.broadcast_to(np.arange(classes), labels.shape), labels


@dataclass(frozen=True)
class LabelType:
    """What the labels of a set are.

    Args:
        stored_as: label type of the store.
        top_k: k, or 0 for C.
        shapes: that the labels may have, without M; 0 stands for C.
        split: (labels, C) -> classes (M, k), probabilities (M, k).
    """

    stored_as: str
    top_k: int
    shapes: tuple[tuple[int, ...], ...]
    split: Callable[[Array, int], tuple[Array, Array]]

    def sparse(self, labels: Array, classes: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]:
        """Classes and probabilities (M, k), most probable first; QatError for labels of another type."""
        shapes = [(len(labels), *(size or classes for size in shape)) for shape in self.shapes]
        if labels.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise QatError(f"its labels are {labels.shape}, expected {expected}: give the label_type of the set")
        found, probs = self.split(labels, classes)
        numbers, probs = _class_numbers(found, classes), probs.astype(np.float64)
        if not (probs >= 0).all() or not ((sums := probs.sum(1)) > 0).all() or (sums > TOO_MUCH).any():
            raise QatError("its labels are no probabilities, which are 0 or more and sum to at most 1")
        order = np.argsort(-probs, axis=1, kind="stable")
        return np.take_along_axis(numbers, order, 1), np.take_along_axis(probs, order, 1).astype(np.float16)


LABEL_TYPES = {
    "marginal_smoothing_k5": LabelType(MARGINAL_SMOOTHING, 5, ((2, 5),), _pairs),
    "marginal_smoothing_k10": LabelType(MARGINAL_SMOOTHING, 10, ((2, 10),), _pairs),
    "marginal_renorm": LabelType(MARGINAL_RENORM, 5, ((2, 5),), _pairs),
    "marginal_renorm_k5": LabelType(MARGINAL_RENORM, 5, ((2, 5),), _pairs),
    "smoothing": LabelType(MARGINAL_SMOOTHING, 1, ((2,),), _pairs),
    "hard": LabelType(HARD, 1, ((), (1,)), _alone),
    "ori": LabelType(MARGINAL_SMOOTHING, 0, ((0,),), _all),
}


def _class_numbers(found: Array, classes: int) -> npt.NDArray[np.uint16]:
    """Floats that are integers as such; QatError for others, and for a class that is none or comes twice."""
    if found.dtype == np.float16 and classes > HALF + 1:
        raise QatError(f"its class numbers are float16, exact up to {HALF}, of {classes} classes: make it in float32")
    numbers = np.sort(found.astype(np.float64), 1)  # half precision would compare with a rounded C
    bad = ~((numbers >= 0) & (numbers < classes) & (numbers == np.rint(numbers)))
    if bad.any():
        raise QatError(f"class {numbers[bad][0]} is none of 0..{classes - 1}: are label_type and data.root right?")
    if (numbers[:, 1:] == numbers[:, :-1]).any():
        raise QatError("a crop has the same class twice: replace the file")
    return found.astype(np.uint16)


def pixel_boxes(fractions: Array, height: int, width: int) -> npt.NDArray[np.uint16]:
    """Boxes (M, 4) in pixels where a replay with Pillow has them: each edge is rounded, half to even.

    A box that leaves the image by no more than its fractions were rounded ends at the border, where a replay would add
    black pixels; QatError for others that leave it, and for empty ones.
    """
    sides, exact = np.array([height, width]), fractions.astype(np.float64)
    start = exact[:, :2] * sides
    end = start + exact[:, 2:] * sides
    spacing = np.spacing(fractions).astype(np.float64)
    rounded = (spacing[:, :2] + spacing[:, 2:]) / 2 * sides  # the most that the end can be off
    low, high = np.rint(start), np.rint(end)
    high = np.where((high > sides) & (end - rounded <= sides), sides, high)
    bad = ~((low >= 0) & (high > low) & (high <= sides)).all(1)  # also NaN
    if bad.any():
        crop = int(bad.argmax())
        raise QatError(
            f"the box of crop {crop}, {exact[crop].round(4).tolist()}, is empty or leaves its image of {width} x "
            f"{height} pixels: replace the file"
        )
    return np.concatenate([low, high - low], 1).astype(np.uint16)


def image_size(path: Path) -> tuple[int, int]:
    """H and W, from the first bytes of an image file; QatError if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # Pillow has no common base
        raise QatError(f"cannot read {path}: {reason(error)}; repair it and run again") from None
    if max(height, width) > LARGEST:
        raise QatError(f"{path} has {width} x {height} pixels: sides can have at most {LARGEST}")
    return height, width


@dataclass(frozen=True)
class LabelFolder:
    """The label files of the images of a class-folder tree.

    Args:
        folder: holds <class>/<image name up to its first dot>.tar; `class_folder` finds it.
        kind: what the labels are.
        classes: C.
        trust_pickles: read files that could run code.
    """

    folder: Path
    kind: LabelType
    classes: int
    trust_pickles: bool

    def file(self, path: str) -> Path:
        """Of an image <class>/<name>."""
        folder, _, name = path.rpartition("/")
        return self.folder / folder / (name.partition(".")[0] + SUFFIX)

    def check(self, paths: Sequence[str]) -> None:
        """QatError unless every image has a label file of its own; none is opened."""
        missing: list[str] = []
        for folder, members in groupby(paths, lambda path: path.partition("/")[0]):
            there = set(os.listdir(self.folder / folder)) if (self.folder / folder).is_dir() else set()
            taken: dict[str, str] = {}
            for path in members:
                name = self.file(path).name
                if (other := taken.setdefault(name, path)) != path:
                    raise QatError(f"{other} and {path} both have the labels {self.file(path)}: keep one of the images")
                missing += [] if name in there else [path]
        if missing:
            raise QatError(
                f"no label file {self.file(missing[0])}, nor those of {len(missing) - 1} more of {len(paths)} images: "
                "add them, or take these images out of data.root"
            )

    def crops(self, path: str) -> int:
        """M of an image."""
        return len(self._read(self.file(path))[0])

    def is_half(self, path: str) -> bool:
        """Whether the boxes of an image are in half precision."""
        return self._read(self.file(path))[0].dtype == np.float16

    def row(self, path: str, image: Path, crops: int) -> Row:
        """The labels of an image; QatError that names the label file if it has other than ``crops`` good ones."""
        file, size = self.file(path), image_size(image)
        fractions, flips, labels = self._read(file)
        try:
            if len(fractions) != crops:
                raise QatError(f"it has {len(fractions)} crops, the store has {crops}: replace the file")
            classes, probs = self.kind.sparse(labels, self.classes)
            return Row(pixel_boxes(fractions, *size), flips, classes, probs, size)
        except QatError as error:
            raise QatError(f"{file}: {error}; labels imported so far are kept") from None

    def _read(self, file: Path) -> tuple[Array, npt.NDArray[np.bool_], Array]:
        content = load(file, self.trust_pickles)
        try:
            fractions, flips, labels = (np.asarray(part) for part in content)
        except (TypeError, ValueError):
            raise QatError(f"{file} holds no list of boxes, flips and labels: is it a label file of FKD?") from None
        crops = len(labels) if labels.ndim else 0
        right = crops and fractions.shape == (crops, 4) and fractions.dtype.kind == "f" and flips.shape == (crops,)
        if not right or not np.isin(flips, (0, 1)).all() or labels.dtype.kind not in "fiu":
            raise QatError(
                f"{file} has boxes {fractions.dtype} {fractions.shape}, flips {flips.dtype} {flips.shape} and labels "
                f"{labels.dtype} {labels.shape}, expected (M, 4), (M,) and (M, ...): is it a label file of FKD?"
            )
        return fractions, flips.astype(np.bool_), labels


def class_folder(root: Path, classes: Sequence[str]) -> Path:
    """Which folder of a set holds the class folders; QatError if none does."""
    for name in FOLDERS:
        if any((root / name / folder).is_dir() for folder in classes):
            return root / name
    places = ", ".join(str(root / name / "<class>") for name in FOLDERS)
    raise QatError(f"no folder of a class below {root}: label files are looked for in {places}")


def load(file: Path, trust_pickles: bool) -> Any:
    """What a file holds; QatError if it cannot be read, or not without a loader that can run code from it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=not trust_pickles)
    except Exception as error:  # a damaged pickle can raise anything
        if not trust_pickles and ("GLOBAL" in str(error) or (file.is_file() and zipfile.is_zipfile(file))):
            raise QatError(
                f"{file} is a pickle of more than tensors, and reading such a file can run code that someone put into "
                "it: set trust_pickles true if you trust whoever made these files"
            ) from None
        raise QatError(
            f"cannot read {file}, it may be damaged or incomplete ({first_line(error)}): replace it and run again; "
            "labels imported so far are kept"
        ) from None
