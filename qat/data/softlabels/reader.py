"""Reading a store of soft labels at random, in many processes.

Shapes: N images, M crops of each, m of them chosen, k stored classes.

HDF5 says once where the data sets are. The labels of an image are then read without HDF5, whose handles and locks do
not survive a fork. Each process opens the file when it first reads. The memory for a row is allocated once, because new
memory of 14 kB for every image would take several times as long as the read.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from qat.data.decode import decode
from qat.data.softlabels.opening import check_lists, first_difference, names_in, open_store
from qat.data.softlabels.store import Header, ImageLabels, sha256_of
from qat.data.source import Source
from qat.errors import QatError

COMPARED = 8  # images whose size is compared before training starts


class SoftLabels:
    """A store to read from, finished or not, in any number of processes but in one thread of each.

    Raises:
        QatError: the file is not a store.

    Attributes:
        path: the file.
        header: how the labels were made.
        done: (N,) bool, which images have labels.
    """

    def __init__(self, path: Path) -> None:
        self._file: io.FileIO | None = None  # belongs to the process _pid, which opened it
        self._pid = 0
        self.path = path
        with open_store(path) as file, io.FileIO(path) as raw:
            self._identity = _identity(raw)
            self.header = Header.from_attrs(file.attrs, path)
            self.done: npt.NDArray[np.bool_] = file["done"][:].astype(bool)
            self._sizes: npt.NDArray[np.uint16] = file["image_size"][:]  # 5 MB for ImageNet
            self._crops, self._flips = (_Rows(file[name]) for name in ("crops", "flip"))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    @classmethod
    def of(
        cls, path: Path, source: Source, classes: Sequence[str], crop_options: Mapping[str, object], partial: bool
    ) -> SoftLabels:
        """Open a store and check that it fits the images to train on.

        Args:
            path: the store.
            source: the training images.
            classes: class names in the order of their labels.
            crop_options: those of scale, ratio and flip that were given; they must be those of the store.
            partial: accept an unfinished store.

        Raises:
            QatError: the store cannot be used for training on these images.
        """
        labels = cls(path)
        labels.check_crop_options(crop_options)
        labels.check_images(source, classes)
        labels.check_finished(partial)
        return labels

    def read(self, index: int, crops: npt.NDArray[np.int64] | None = None) -> ImageLabels:
        """The labels of one image.

        Args:
            index: number of the image.
            crops: numbers of the m crops to return, in this order; all M when None.

        Raises:
            QatError: the image has no labels, or the file has changed.
        """
        if not self.done[index]:
            raise QatError(f"{self.path} has no labels yet for image {index}")
        try:
            file = self._opened()
            complete = self._crops.read(file, index) and self._flips.read(file, index)
        except OSError as error:
            raise QatError(f"cannot read the soft labels {self.path}: {error.strerror}") from None
        if not complete:
            raise QatError(f"{self.path} has become shorter: it was complete when it was opened")
        some = np.arange(self.header.num_crops) if crops is None else crops
        bits, top_k = self._flips.content.tobytes(), self.header.top_k
        flips = np.array([bits[crop >> 3] >> (crop & 7) & 1 for crop in some.tolist()], np.bool_)
        columns = self._crops.content.take(some, 0)  # (m, 4 + 2k), a copy
        probs = columns[:, 4 + top_k :].view(np.float16)
        height, width = self._sizes[index].tolist()
        return ImageLabels(columns[:, :4], flips, columns[:, 4 : 4 + top_k], probs, (height, width))

    def _opened(self) -> io.FileIO:
        """The file, opened by this process; QatError if another file has taken its place."""
        if self._file is None or self._pid != os.getpid():
            self._file, self._pid = io.FileIO(self.path), os.getpid()
            if _identity(self._file) != self._identity:
                raise QatError(f"{self.path} is another file than when training began")
        return self._file

    def check_images(self, source: Source, classes: Sequence[str]) -> None:
        """QatError, with the first difference, unless the labels were made on these images and classes."""
        paths = source.names
        with open_store(self.path) as file:
            check_lists(file, self.path)
            if sha256_of(classes) != self.header.class_list_sha256:
                raise QatError(
                    f"{self.path} was made on other classes: {first_difference(names_in(file, 'class_name'), classes)}"
                )
            if sha256_of(paths) != self.header.path_list_sha256:
                difference = first_difference(names_in(file, "path"), paths)
                raise QatError(f"{self.path} was made on other images than those of {source.place}: {difference}")
        finished = np.flatnonzero(self.done)
        for index in finished[:: max(1, len(finished) // COMPARED)]:
            try:
                _, height, width = decode(source.open(index)).shape
            except Exception:  # an unreadable image is reported when its turn comes
                continue
            check_size(self.read(index).image_size, (height, width), f"{source.path(index)}: ")

    def check_finished(self, partial: bool) -> None:
        """QatError for a store in which labels are missing, unless ``partial`` and there are some."""
        if not self.done.all() and not (partial and self.done.any()):
            way_out = "" if partial else ", or train on those with data.softlabels_partial true"
            raise QatError(
                f"{self.path} is not finished, {self.done.sum()} of {len(self.done)} images have labels: run "
                f"qat make-softlabels again{way_out}"
            )

    def check_crop_options(self, given: Mapping[str, object]) -> None:
        """QatError when a given option (scale, ratio or flip) differs from that of the stored crops."""
        stored = {"scale": self.header.crop_scale, "ratio": self.header.crop_ratio, "flip": self.header.flip_p}
        for name, value in given.items():
            if not np.allclose(stored[name], value):  # type: ignore[arg-type]
                option = "data.flip" if name == "flip" else f"data.crop_{name}"
                raise QatError(f"{option} is {value}, but the crops of {self.path} have {stored[name]}: set it to null")

    def __str__(self) -> str:
        """Teacher, number of crops and a hash of the header, which decides the labels."""
        header = self.header
        digest = hashlib.sha256(repr(header).encode()).hexdigest()[:8]
        return f"{header.teacher}, {header.num_crops} crops, top {header.top_k} of {header.num_classes}, {digest}"


class _Rows:
    """The rows of a data set, one for each image; ``content`` holds the row that was read last."""

    def __init__(self, data: h5py.Dataset) -> None:
        self.offset: int = data.id.get_offset()  # bytes before the first row
        self.content = np.empty(data.shape[1:], data.dtype)
        self.size = self.content.nbytes

    def read(self, file: io.FileIO, index: int) -> bool:
        """Read a row; whether the file has all of it."""
        start = self.offset + index * self.size
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), (self.content.data,), start) == self.size
        file.seek(start)  # Windows
        return file.readinto(self.content.data) == self.size


def _identity(file: io.FileIO) -> tuple[int, int]:
    """What distinguishes a file from another one of the same name."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def check_size(labeled: tuple[int, int], found: tuple[int, int], place: str = "") -> None:
    """QatError when an image has another height or width than the image whose crops were labeled."""
    if labeled != found:
        raise QatError(
            f"{place}{found[1]} x {found[0]} pixels, but its soft labels were made on {labeled[1]} x {labeled[0]}"
        )
