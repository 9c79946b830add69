"""Soft labels of many crops per image, one HDF5 file: its format, which docs/softlabels.md specifies.

Shapes: N images, M crops of each, k stored classes per crop, C classes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from errno import ENOLCK
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from qat.data.crops import Crop
from qat.errors import QatError, first_line

FORMAT, VERSION = "qat-softlabels", 1
MARGINAL_SMOOTHING, MARGINAL_RENORM, HARD = LABEL_TYPES = ("marginal_smoothing", "marginal_renorm", "hard")
LOCK_SECONDS = 5.0
LARGEST = 65535  # of a coordinate, an image side, a class
LIBVER = ("earliest", "v108")  # newer formats mark a file that is open for writing, and refuse it after a kill
ENCODING = {"box_encoding": "pixel_tlhw_u16", "value_encoding": "f16_bits_u16", "flip_encoding": "bits_little_u8"}


@dataclass(frozen=True)
class Header:
    """The attributes of a store that say how its labels were made; two stores with equal ones hold equal labels."""

    teacher: str
    teacher_sha256: str  # of the weights
    teacher_input_size: int
    teacher_interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temperature: float
    label_type: str
    top_k: int
    num_crops: int
    num_classes: int
    crop_scale: tuple[float, ...]
    crop_ratio: tuple[float, ...]
    flip_p: float
    seed: int
    batch_size: int  # crops per forward of the teacher; it decides how sums are rounded
    precision: str
    split: str
    class_list_sha256: str
    path_list_sha256: str

    def __post_init__(self) -> None:
        if self.label_type not in LABEL_TYPES:
            raise QatError(f"label_type is {self.label_type!r}: choose from {LABEL_TYPES}")
        if not 1 <= self.top_k <= self.num_classes:
            raise QatError(f"topk is {self.top_k}: choose 1..{self.num_classes}, the number of classes")
        if self.label_type == HARD and self.top_k != 1:
            raise QatError(f"topk is {self.top_k}: hard labels are one class, so topk is 1")
        if self.num_crops < 1 or self.num_classes > LARGEST + 1:
            raise QatError(
                f"crops is {self.num_crops}, classes {self.num_classes}: at least 1, and at most {LARGEST + 1}"
            )
        if not self.temperature > 0:
            raise QatError(f"temperature is {self.temperature}: it must be positive")

    def to_attrs(self) -> dict[str, Any]:
        """Attribute names and values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], source: Path) -> Header:
        """Read what `to_attrs` made; QatError for a foreign or incomplete set."""
        if (found := attrs.get("format")) != FORMAT:
            raise QatError(f"{source} is no store of soft labels: its attribute 'format' is {found!r}, not {FORMAT!r}")
        if (version := attrs.get("version")) != VERSION:
            raise QatError(f"{source} has version {version} of the format, this version of qat reads {VERSION}")
        expected = [field.name for field in fields(cls)] + list(ENCODING)
        if missing := [name for name in expected if name not in attrs]:
            raise QatError(f"{source} lacks the attribute {missing[0]!r} of a store of soft labels")
        if wrong := [name for name, value in ENCODING.items() if attrs[name] != value]:
            raise QatError(f"{source}: {wrong[0]} is {attrs[wrong[0]]!r}, only {ENCODING[wrong[0]]!r} can be read")
        return cls(**{field.name: _plain(attrs[field.name]) for field in fields(cls)})


def _plain(value: Any) -> Any:
    return tuple(float(v) for v in value) if isinstance(value, np.ndarray) else getattr(value, "item", lambda: value)()


class Row(NamedTuple):
    """The labels of one image."""

    boxes: npt.NDArray[np.uint16]  # (M, 4): top, left, height, width in pixels of the decoded image
    flips: npt.NDArray[np.bool_]  # (M,)
    classes: npt.NDArray[np.uint16]  # (M, k), most probable first
    probs: npt.NDArray[np.float16]  # (M, k)
    image_size: tuple[int, int]  # height, width

    def packed(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
        """The rows of the data sets ``crops`` and ``flip``."""
        crops = np.concatenate([self.boxes, self.classes, self.probs.view(np.uint16)], axis=1)
        return crops, np.packbits(self.flips, bitorder="little")

    def crops(self) -> list[Crop]:
        """The boxes and flips."""
        boxes = zip(self.boxes.tolist(), self.flips.tolist(), strict=True)
        return [Crop(top, left, height, width, flip) for (top, left, height, width), flip in boxes]

    def take(self, order: npt.NDArray[np.int64]) -> Row:
        """The same of some crops, in that order."""
        return Row(self.boxes[order], self.flips[order], self.classes[order], self.probs[order], self.image_size)

    def check(self, num_classes: int) -> None:
        """QatError for values that no writer makes: an empty box, one that leaves the image, a class that is none."""
        boxes, (height, width) = self.boxes.astype(np.int64), self.image_size
        ends = boxes[:, :2] + boxes[:, 2:]
        inside = (boxes[:, 2:] > 0).all() and (ends <= (height, width)).all()
        certain = ((self.probs >= 0) & (self.probs <= 1)).all() and (self.probs[:, 0] > 0).all()  # False for NaN
        if not inside or not certain or (self.classes >= num_classes).any():
            raise QatError("its soft labels are damaged: a box, a class or a probability is impossible")


def layout(header: Header, images: int, width: int, class_width: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every data set; ``width`` bytes hold the longest path, ``class_width`` the longest class."""
    return {
        "crops": ((images, header.num_crops, 4 + 2 * header.top_k), np.uint16),
        "flip": ((images, -(-header.num_crops // 8)), np.uint8),
        "image_size": ((images, 2), np.uint16),
        "target": ((images,), np.uint16),
        "path": ((images,), h5py.string_dtype("utf-8", width)),
        "class_name": ((header.num_classes,), h5py.string_dtype("utf-8", class_width)),
        "done": ((images,), np.uint8),
    }


def sha256_of(names: Iterable[str]) -> str:
    """Of a list of names: their UTF-8 bytes, each ended by a line feed."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode(errors="surrogateescape")).hexdigest()


def row_bytes(header: Header) -> int:
    """Bytes of one image in ``crops`` and ``flip``."""
    return header.num_crops * 2 * (4 + 2 * header.top_k) + -(-header.num_crops // 8)


def create(path: Path, header: Header, paths: Sequence[str], classes: Sequence[str], software: str) -> None:
    """Write a store without labels; it appears under its name when it is complete, with all its space laid out."""
    names, class_names = _utf8(paths), _utf8(classes)
    number = {name: i for i, name in enumerate(classes)}
    values = {
        "target": np.array([number[path.partition("/")[0]] for path in paths], np.uint16),
        "path": names,
        "class_name": class_names,
        "done": np.zeros(len(paths), np.uint8),
    }
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # a row written later moves nothing else in the file
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # rows that do not exist yet are holes
    part = path.with_name(f"{path.name}.new")
    part.unlink(missing_ok=True)
    with h5py.File(part, "w", libver=LIBVER) as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "software": software, **ENCODING, **header.to_attrs()})
        sizes = layout(header, len(paths), names.dtype.itemsize, class_names.dtype.itemsize)
        for name, (shape, dtype) in sizes.items():
            data = file.create_dataset(name, shape, dtype, dcpl=early)
            if name in values:
                data[...] = values[name]
        file.flush()
        sync(file)
    part.replace(path)


def _utf8(names: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """As wide as the longest; a type that HDF5 knows as UTF-8."""
    try:
        content = [name.encode() for name in names]
    except UnicodeEncodeError as error:
        raise QatError(f"the name {error.object!a} is not UTF-8, as which names are stored: rename it") from None
    return np.array(content, h5py.string_dtype("utf-8", max(map(len, content))))


def sync(file: h5py.File) -> None:
    """Wait until what was flushed is on the disk."""
    os.fsync(file.id.get_vfd_handle())


def open_store(path: Path, mode: str = "r") -> h5py.File:
    """The open file of a store, its attributes and data sets looked at; QatError for anything else."""
    if not path.is_file():
        raise QatError(
            f"no soft labels {path}: tools/make_softlabels.py makes them; an online teacher does without "
            "(--data.softlabels null --model.teacher NAME)"
        )
    try:
        file = _unlocked(path, mode)
    except BlockingIOError:
        raise QatError(
            f"{path} is being written by another process, perhaps one that a stopped run has left: wait until it has "
            "ended, or end it"
        ) from None
    except OSError as error:
        why = "it is cut off" if "truncated" in str(error) else first_line(error)
        if error.errno == ENOLCK:
            why = "its file system has no locks: set HDF5_USE_FILE_LOCKING=FALSE and never start twice at once"
        raise QatError(f"cannot read the soft labels {path}: {why}") from None
    try:
        _check_layout(file, Header.from_attrs(file.attrs, path), path)
    except BaseException:
        file.close()
        raise
    return file


def _unlocked(path: Path, mode: str) -> h5py.File:
    """The file, waiting a little: a process that was killed keeps its lock for a moment."""
    patience = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return h5py.File(path, mode, libver=LIBVER if mode != "r" else None)
        except BlockingIOError:
            if time.monotonic() > patience:
                raise
            time.sleep(0.2)


def _check_layout(file: h5py.File, header: Header, path: Path) -> None:
    images = file["done"].shape[0] if "done" in file else 0
    widths = [file[name].dtype.itemsize if name in file else 1 for name in ("path", "class_name")]
    end = 0
    for name, (shape, dtype) in layout(header, images, *widths).items():
        if name not in file:
            raise QatError(f"{path} lacks the data set {name!r} of a store of soft labels")
        data = file[name]
        if data.shape != shape or data.dtype != np.dtype(dtype):
            raise QatError(f"{path}: {name} is {data.dtype} {data.shape}, expected {np.dtype(dtype)} {shape}")
        if data.chunks is not None or data.id.get_offset() is None:
            raise QatError(f"{path}: {name} is not contiguous; copy it with h5repack -l CONTI")
        end = max(end, data.id.get_offset() + data.id.get_storage_size())
    if (size := path.stat().st_size) < end:
        raise QatError(f"cannot read the soft labels {path}: it is cut off, {size} of {end} bytes are there")


def names_in(file: h5py.File, name: str) -> Iterator[str]:
    """The strings of ``path`` or ``class_name``."""
    return (value.decode() for value in file[name][:])


def first_difference(stored: Iterable[str], given: Sequence[str]) -> str:
    """The first place where a stored list of names and the one of this machine differ, in words."""
    for theirs, ours in zip_longest(stored, given):
        if theirs != ours:
            return f"first, {'nothing' if ours is None else repr(ours)} is here where the labels have " + (
                "nothing" if theirs is None else repr(theirs)
            )
    return "the names agree, so the stored hash is wrong"
