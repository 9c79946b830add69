"""The store of soft labels, an HDF5 file of many crops per image. docs/softlabels.md specifies the format.

Shapes: N images, M crops of each, k stored classes per crop, C classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from qat.data.crops import Crop
from qat.errors import QatError

FORMAT, VERSION = "qat-softlabels", 1
MARGINAL_SMOOTHING, MARGINAL_RENORM, HARD = LABEL_TYPES = ("marginal_smoothing", "marginal_renorm", "hard")
LARGEST = 65535  # coordinate, image side or class number that a store can hold
LIBVER = ("earliest", "v108")  # newer formats mark a file as open for writing; after a kill it could not be opened
ENCODING = {"box_encoding": "pixel_tlhw_u16", "value_encoding": "f16_bits_u16", "flip_encoding": "bits_little_u8"}


@dataclass(frozen=True)
class Header:
    """The attributes of a store that say how its labels were made; stores with equal headers hold equal labels.

    Raises:
        QatError: no store can have these values.
    """

    teacher: str
    teacher_sha256: str  # hash of the weights
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
    batch_size: int  # crops per forward pass of the teacher, on which the rounding of sums depends
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
        """The header as HDF5 attributes, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], source: Path) -> Header:
        """Read the attributes that `to_attrs` made; QatError for those of another format, or if some are missing."""
        if (found := attrs.get("format")) != FORMAT:
            raise QatError(
                f"{source} is not a store of soft labels: its attribute 'format' is {found!r}, not {FORMAT!r}"
            )
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


class ImageLabels(NamedTuple):
    """The labels of the M crops of one image, or of some of them."""

    boxes: npt.NDArray[np.uint16]  # (M, 4): top, left, height, width in pixels of the decoded image
    flips: npt.NDArray[np.bool_]  # (M,)
    classes: npt.NDArray[np.uint16]  # (M, k), most probable first
    probs: npt.NDArray[np.float16]  # (M, k)
    image_size: tuple[int, int]  # height, width

    def packed(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
        """The row of this image in the data sets ``crops`` (M, 4 + 2k) and ``flip`` (ceil(M / 8),)."""
        crops = np.concatenate([self.boxes, self.classes, self.probs.view(np.uint16)], axis=1)
        return crops, np.packbits(self.flips, bitorder="little")

    def crops(self) -> list[Crop]:
        """The boxes and flips, crop by crop."""
        boxes = zip(self.boxes.tolist(), self.flips.tolist(), strict=True)
        return [Crop(top, left, height, width, flip) for (top, left, height, width), flip in boxes]

    def check(self, num_classes: int) -> None:
        """QatError for values that no writer makes: an empty box or one that leaves the image, an unknown class."""
        height, width = self.image_size
        boxes = self.boxes.tolist()  # a few boxes are compared faster as Python numbers
        inside = all(h > 0 and w > 0 and top + h <= height and left + w <= width for top, left, h, w in boxes)
        probable = ((self.probs >= 0) & (self.probs <= 1)).all() and (self.probs[:, 0] > 0).all()  # False for NaN
        if not inside or not probable or (self.classes >= num_classes).any():
            raise QatError("its soft labels are damaged: a box, a class or a probability is impossible")


def layout(header: Header, images: int, width: int, class_width: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every data set of a store of N ``images``.

    Args:
        header: M, k and C.
        images: N.
        width: bytes of the longest path.
        class_width: bytes of the longest class name.
    """
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
    """SHA-256 of the UTF-8 bytes of a list of names, each followed by a line feed."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode(errors="surrogateescape")).hexdigest()


def row_bytes(header: Header) -> int:
    """Bytes that one image takes in ``crops`` and ``flip``."""
    return header.num_crops * 2 * (4 + 2 * header.top_k) + -(-header.num_crops // 8)


def create(path: Path, header: Header, paths: Sequence[str], classes: Sequence[str], software: str) -> None:
    """Write a store without labels, with space for all of them; ``path`` appears only when the file is complete."""
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
    """The names as UTF-8 strings of fixed width, that of the longest, in a type that HDF5 knows as UTF-8."""
    try:
        content = [name.encode() for name in names]
    except UnicodeEncodeError as error:
        raise QatError(f"the name {error.object!a} cannot be stored because it is not UTF-8: rename it") from None
    return np.array(content, h5py.string_dtype("utf-8", max(map(len, content))))


def sync(file: h5py.File) -> None:
    """Wait until everything that was flushed is on the disk; on Windows HDF5 has no descriptor to wait for."""
    if os.name != "nt":
        os.fsync(file.id.get_vfd_handle())
