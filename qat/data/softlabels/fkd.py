"""Reads the label files of FKD (Shen and Xing, ECCV 2022), one per image.

Shapes: M crops of an image, k stored classes per crop, C classes; H, W pixels of the image. A file is a pickled list of
three arrays: boxes (M, 4) as top / H, left / W, height / H, width / W in float32 or float16; flips (M,); labels, which
`fkd_label_types` describes.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from qat.data.decode import reason, size_of
from qat.data.softlabels.fkd_label_types import Array, LabelType
from qat.data.softlabels.store import LARGEST, ImageLabels
from qat.errors import QatError, first_line

FOLDERS = ("imagenet/train", "train", "")  # of the classes, below the folder of a set
SUFFIX = ".tar"  # despite its name the file is a pickle


def pixel_boxes(fractions: Array, height: int, width: int) -> npt.NDArray[np.uint16]:
    """Boxes (M, 4) in pixels: top, left, height, width, as Pillow cuts them out, with each edge rounded, half to even.

    A box that leaves the image by no more than the rounding of its fractions ends at the border; Pillow would add black
    pixels there.

    Args:
        fractions: boxes (M, 4) as fractions of the image.
        height: H.
        width: W.

    Raises:
        QatError: a box is empty or leaves the image.
    """
    sides, exact = np.array([height, width]), fractions.astype(np.float64)
    start = exact[:, :2] * sides
    end = start + exact[:, 2:] * sides
    spacing = np.spacing(fractions).astype(np.float64)
    rounded = (spacing[:, :2] + spacing[:, 2:]) / 2 * sides  # the largest error of the end
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


def image_size(file: Path | BinaryIO, name: str = "") -> tuple[int, int]:
    """H and W, read from the first bytes of an image file, or of its content; QatError if it cannot be read.

    Args:
        file: the file, or its content.
        name: what an error calls it; its path when empty.
    """
    name = name or str(file)
    try:
        width, height = size_of(file)
    except Exception as error:  # Pillow has no common base
        raise QatError(f"cannot read {name}: {reason(error)}; repair it and run again") from None
    if max(height, width) > LARGEST:
        raise QatError(f"{name} has {width} x {height} pixels: sides can have at most {LARGEST}")
    return height, width


@dataclass(frozen=True)
class LabelFolder:
    """The label files that belong to the images of a class-folder tree.

    Args:
        folder: holds <class>/<image name up to its first dot>.tar; `class_folder` finds it.
        kind: kind of the labels.
        classes: C.
        trust_pickles: read files that could run code.
    """

    folder: Path
    kind: LabelType
    classes: int
    trust_pickles: bool

    def file(self, path: str) -> Path:
        """The label file of an image <class>/<name>."""
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
        """M, the number of crops of an image."""
        return len(self._read(self.file(path))[0])

    def is_half(self, path: str) -> bool:
        """Whether the boxes of an image are in half precision."""
        return self._read(self.file(path))[0].dtype == np.float16

    def read(self, path: str, image: Path | BinaryIO, crops: int) -> ImageLabels:
        """The labels of an image.

        Args:
            path: <class>/<name> of the image.
            image: the image file, or its content, for its size.
            crops: M, which every label file must have.

        Raises:
            QatError: the label file or the image cannot be used; it is named.
        """
        file, size = self.file(path), image_size(image, path)
        fractions, flips, labels = self._read(file)
        try:
            if len(fractions) != crops:
                raise QatError(f"it has {len(fractions)} crops, the store has {crops}: replace the file")
            classes, probs = self.kind.sparse(labels, self.classes)
            return ImageLabels(pixel_boxes(fractions, *size), flips, classes, probs, size)
        except QatError as error:
            raise QatError(f"{file}: {error}; labels imported so far are kept") from None

    def _read(self, file: Path) -> tuple[Array, npt.NDArray[np.bool_], Array]:
        content = load(file, self.trust_pickles)
        try:
            fractions, flips, labels = (np.asarray(part) for part in content)
        except (TypeError, ValueError, RuntimeError):
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
    """The folder of a set that holds the class folders; QatError if there is none."""
    for name in FOLDERS:
        if any((root / name / folder).is_dir() for folder in classes):
            return root / name
    places = ", ".join(str(root / name / "<class>") for name in FOLDERS)
    raise QatError(f"no folder of a class below {root}: label files are looked for in {places}")


def load(file: Path, trust_pickles: bool) -> Any:
    """Unpickle a file.

    Args:
        file: to read.
        trust_pickles: also read a file that could run code; one of arrays and tensors cannot.

    Raises:
        QatError: the file is damaged, or could run code and is not trusted.
    """
    if not file.is_file():
        raise QatError(f"cannot read {file}: it is not a file; labels imported so far are kept")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_arrays()):
            warnings.simplefilter("ignore")  # about the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=not trust_pickles)
    except Exception as error:  # a damaged pickle can raise anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named and not trust_pickles:
            raise QatError(
                f"{file} is a pickle of more than arrays and tensors, it names {named[1]}: "
                "reading it can run code that someone put into it; set trust_pickles true if you trust whoever made it"
            ) from None
        why = (
            "it is no pickle that can be read without trust_pickles"
            if "Weights only" in str(error)
            else first_line(error)
        )
        raise QatError(
            f"cannot read {file}, it may be damaged or incomplete ({why}): replace it and run again; labels imported "
            "so far are kept"
        ) from None


@cache
def _arrays() -> list[Any]:
    """What a pickle of arrays of numbers names, under the names of all versions of NumPy; none of it runs code."""
    makers: list[Any] = [np.zeros(0).__reduce__()[0], np.float32(0).__reduce__()[0]]
    rooms = ("numpy.core.multiarray", "numpy._core.multiarray")
    types = [type(np.dtype(letter)) for letter in "?bBhHiIlLqQefd"]
    return [np.ndarray, np.dtype, *types, *((make, f"{room}.{make.__name__}") for make in makers for room in rooms)]
