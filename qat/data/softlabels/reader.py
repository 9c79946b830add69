"""Reading a store of soft labels at random, in many processes. Shapes: M crops of an image, m chosen, k classes.

A row is read with one system call for each of its three parts, without HDF5, whose handles and locks do not survive a
fork. The file is opened by each process when it first reads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from qat.data.crops import replay
from qat.data.folder import find_images
from qat.data.images import TopK
from qat.data.softlabels.store import (
    HARD,
    MARGINAL_RENORM,
    Header,
    Row,
    first_difference,
    names_in,
    open_store,
    sha256_of,
)
from qat.data.streams import rng_for
from qat.errors import QatError

LOOKED_AT = 8  # images whose size is compared before training starts


class SoftLabels:
    """A finished or unfinished store; QatError if it is not one.

    Attributes:
        header: how the labels were made.
        done: (N,) bool, images that have labels.
    """

    def __init__(self, path: Path) -> None:
        self._opened: tuple[int, int] | None = None  # process, file descriptor
        self.path = path
        with open_store(path) as file:
            self._file = _identity(path.stat())
            self.header = Header.from_attrs(file.attrs, path)
            self.done: npt.NDArray[np.bool_] = file["done"][:].astype(bool)
            self._offsets = [file[name].id.get_offset() for name in ("crops", "flip", "image_size")]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def __del__(self) -> None:
        if self._opened is not None and self._opened[0] == os.getpid():
            os.close(self._opened[1])

    @classmethod
    def of(
        cls, path: Path, folder: Path, classes: Sequence[str], law: Mapping[str, object], partial: bool
    ) -> SoftLabels:
        """The store for training on the images of ``folder``; QatError when it cannot be used for that.

        Args:
            path: of the store.
            folder: root/train.
            classes: in label order.
            law: crop options that were given (scale, ratio, flip); they must be those of the store.
            partial: an unfinished store will do.
        """
        labels = cls(path)
        labels.check_law(law)
        labels.check_images(folder, find_images(folder), classes)
        labels.check_finished(partial)
        return labels

    def row(self, index: int) -> Row:
        """The labels of one image; QatError if it has none, or if the file has changed."""
        if not self.done[index]:
            raise QatError(f"{self.path} has no labels yet for image {index}")
        crops, top_k = self.header.num_crops, self.header.top_k
        values = self._read(0, index, 2 * crops * (4 + 2 * top_k)).view(np.uint16).reshape(crops, 4 + 2 * top_k)
        flips = np.unpackbits(self._read(1, index, -(-crops // 8)), count=crops, bitorder="little")
        height, width = self._read(2, index, 4).view(np.uint16).tolist()
        probs = values[:, 4 + top_k :].view(np.float16)
        return Row(values[:, :4], flips.view(np.bool_), values[:, 4 : 4 + top_k], probs, (height, width))

    def _read(self, part: int, index: int, size: int) -> npt.NDArray[np.uint8]:
        """The ``size`` bytes of a row."""
        try:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), os.open(self.path, os.O_RDONLY))
                if _identity(os.fstat(self._opened[1])) != self._file:
                    raise QatError(f"{self.path} is another file than when training began")
            content = os.pread(self._opened[1], size, self._offsets[part] + index * size)
        except OSError as error:
            raise QatError(f"cannot read the soft labels {self.path}: {error.strerror}") from None
        if len(content) != size:
            raise QatError(f"{self.path} has become shorter: it was complete when it was opened")
        return np.frombuffer(content, np.uint8)

    def check_images(self, folder: Path, paths: Sequence[str], classes: Sequence[str]) -> None:
        """QatError, with the first difference, unless the labels are those of these images and classes."""
        with open_store(self.path) as file:
            if sha256_of(classes) != self.header.class_list_sha256:
                raise QatError(
                    f"{self.path} is of other classes: {first_difference(names_in(file, 'class_name'), classes)}"
                )
            if sha256_of(paths) != self.header.path_list_sha256:
                raise QatError(
                    f"{self.path} is of other images than {folder}: {first_difference(names_in(file, 'path'), paths)}"
                )
        finished = np.flatnonzero(self.done)
        for index in finished[:: max(1, len(finished) // LOOKED_AT)]:
            try:
                with Image.open(folder / paths[index]) as image:
                    size = (image.height, image.width)
            except Exception:  # an unreadable image is reported when its turn comes
                continue
            check_size(self.row(index).image_size, size, f"{folder / paths[index]}: ")

    def check_finished(self, partial: bool) -> None:
        """QatError for a store in which labels are missing, unless ``partial`` and there are some."""
        if not self.done.all() and not (partial and self.done.any()):
            way_out = "" if partial else ", or train on those with data.softlabels_partial true"
            raise QatError(
                f"{self.path} is not finished, {self.done.sum()} of {len(self.done)} images have labels: run "
                f"tools/make_softlabels.py again{way_out}"
            )

    def check_law(self, given: Mapping[str, object]) -> None:
        """QatError when options (scale, ratio, flip) ask for other crops than those that are stored."""
        stored = {"scale": self.header.crop_scale, "ratio": self.header.crop_ratio, "flip": self.header.flip_p}
        for name, value in given.items():
            if not np.allclose(stored[name], value):  # type: ignore[arg-type]
                option = "data.flip" if name == "flip" else f"data.crop_{name}"
                raise QatError(f"{option} is {value}, but the crops of {self.path} have {stored[name]}: set it to null")

    def __str__(self) -> str:
        """Teacher, crops and a hash of all that decides the labels."""
        header = self.header
        digest = hashlib.sha256(repr(header).encode()).hexdigest()[:8]
        return f"{header.teacher}, {header.num_crops} crops, top {header.top_k} of {header.num_classes}, {digest}"


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


def check_size(labelled: tuple[int, int], found: tuple[int, int], place: str = "") -> None:
    """QatError when an image has another height and width than the one whose crops were labelled."""
    if labelled != found:
        raise QatError(
            f"{place}{found[1]} x {found[0]} pixels, but its soft labels were made on {labelled[1]} x {labelled[0]}"
        )


def chosen(seed: int, index: int, crops: int, first: int, count: int) -> npt.NDArray[np.int64]:
    """Which ``count`` of an image's crops come after ``first`` others; none comes again before all were used."""
    found = []
    while count:
        turn, place = divmod(first, crops)
        found.append(rng_for(seed, turn, index).permutation(crops)[place : place + count])
        first, count = first + len(found[-1]), count - len(found[-1])
    return np.concatenate(found)


def recover(header: Header, classes: npt.NDArray[np.uint16], probs: npt.NDArray[np.float16]) -> TopK:
    """Stored classes and probabilities (m, k) as labels for the loss, which spreads what they lack of 1."""
    values = torch.from_numpy(probs.astype(np.float32))
    if header.label_type == HARD:
        values = torch.ones_like(values)
    elif header.label_type == MARGINAL_RENORM:
        values = values / values.sum(1, keepdim=True)
    return TopK(torch.from_numpy(classes.astype(np.int64)), values)


@dataclass(frozen=True, eq=False)
class ReplayView:
    """The next m crops of an image and their labels; which they are depends on (seed, image, crops before) alone.

    Args:
        labels: the store.
        rows: row of every image.
        size: S, side of what the student sees.
        interpolation: how crops are resized.
        count: m.
        seed: of the order of the crops.
        before: crops that every image gave in earlier passes.
    """

    labels: SoftLabels
    rows: npt.NDArray[np.int64]
    size: int
    interpolation: str
    count: int
    seed: int
    before: int

    def __call__(self, image: Tensor, index: int, out: Tensor) -> TopK:
        """Write the crops of one RGB image; QatError when its labels are of an image of another size."""
        index = int(self.rows[index])
        row, header = self.labels.row(index), self.labels.header
        check_size(row.image_size, (image.shape[1], image.shape[2]))
        row = row.take(chosen(self.seed, index, header.num_crops, self.before, self.count))
        row.check(header.num_classes)
        replay(image, row.crops(), self.size, self.interpolation, out)
        return recover(header, row.classes, row.probs)
