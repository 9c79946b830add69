"""The store of soft labels, an HDF5 file of many crops per image. docs/softlabels.md specifies the format.

Shapes: N images, M crops of each, k stored classes per crop, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from qat.data.crops import Crop
from qat.data.softlabels.rows import Place, RowFile, not_written, places
from qat.errors import QatError
from qat.ranges import Range, check_fields

FORMAT, VERSION = "qat-softlabels", 1
MARGINAL_SMOOTHING, MARGINAL_RENORM, HARD = LABEL_TYPES = ("marginal_smoothing", "marginal_renorm", "hard")
LARGEST = 65535  # coordinate, image side or class number that a store can hold
HIGHEST_SUM = 1.01  # of probabilities; rounding to half precision exceeds 1 by less
METADATA = 2**16  # bytes; all that HDF5 itself writes into a store is less
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
    teacher_input_size: Annotated[int, Range(1)]
    teacher_interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temperature: Annotated[float, Range(above=0)]
    label_type: str
    top_k: Annotated[int, Range(1)]
    num_crops: Annotated[int, Range(1, LARGEST + 1)]
    num_classes: Annotated[int, Range(1, LARGEST + 1)]
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
        check_fields(self, "attribute ")
        if self.label_type not in LABEL_TYPES:
            raise QatError(f"label_type is {self.label_type!r}: choose from {LABEL_TYPES}")
        if self.top_k > self.num_classes:
            raise QatError(f"topk is {self.top_k}: choose 1..{self.num_classes}, the number of classes")
        if self.label_type == HARD and self.top_k != 1:
            raise QatError(f"topk is {self.top_k}: hard labels are one class, so topk is 1")

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
        try:
            return cls(**{field.name: _plain(attrs[field.name]) for field in fields(cls)})
        except QatError as error:
            raise QatError(f"{source} is damaged: {error}") from None


def _plain(value: Any) -> Any:
    return tuple(value.tolist()) if isinstance(value, np.ndarray) else getattr(value, "item", lambda: value)()


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
        """QatError for values that no writer makes.

        These are an empty box or one that leaves the image, an unknown class or one that a crop has twice, and
        probabilities that are none or whose sum is above 1 by more than rounding.
        """
        height, width = self.image_size
        boxes = self.boxes.tolist()  # a few boxes are compared faster as Python numbers
        inside = all(h > 0 and w > 0 and top + h <= height and left + w <= width for top, left, h, w in boxes)
        probable = ((self.probs >= 0) & (self.probs <= 1)).all() and (self.probs[:, 0] > 0).all()  # False for NaN
        if not inside or not probable or (self.classes >= num_classes).any():
            raise QatError("its soft labels are damaged: a box, a class or a probability is impossible")
        if (self.probs.sum(1, dtype=np.float32) > HIGHEST_SUM).any():
            raise QatError("its soft labels are damaged: the probabilities of a crop sum to more than 1")
        ordered = np.sort(self.classes, 1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise QatError("its soft labels are damaged: a crop has the same class twice")


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


def create(
    path: Path,
    header: Header,
    paths: Sequence[str],
    classes: Sequence[str],
    software: str,
    reserve: bool = True,
    targets: Sequence[int] | None = None,
) -> None:
    """Write a store without labels; ``path`` appears only when the file is complete.

    Args:
        path: the file.
        header: how the labels will be made.
        paths: of the images, ``class/file``.
        classes: names of the classes, in the order of their numbers.
        software: the versions that make the store.
        reserve: take the space for all labels now. Otherwise rows that do not exist yet are holes in the file.
        targets: number of the class of every image; that of its folder when None.

    Raises:
        QatError: the disk is full, or a name cannot be stored.
    """
    names, class_names = _utf8(paths), _utf8(classes)
    if targets is None:
        number = {name: i for i, name in enumerate(classes)}
        targets = [number[path.partition("/")[0]] for path in paths]
    values = {
        "target": np.array(targets, np.uint16),
        "path": names,
        "class_name": class_names,
        "done": np.zeros(len(paths), np.uint8),
    }
    part = path.with_name(f"{path.name}.new")
    try:
        part.write_bytes(bytes(METADATA))  # HDF5 crashes where there is no space for what it writes
        with RowFile(part, {}) as file:
            file.sync()
        with RowFile(part, _lay_out(part, header, len(paths), names, class_names, software)) as file:
            if reserve:
                file.reserve()
            for name, rows in values.items():
                file.write(name, 0, rows)
            file.sync()
        part.replace(path)
    except (OSError, RuntimeError) as error:  # h5py raises either
        raise not_written(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def _lay_out(
    part: Path,
    header: Header,
    images: int,
    names: npt.NDArray[np.bytes_],
    class_names: npt.NDArray[np.bytes_],
    software: str,
) -> dict[str, Place]:
    """Create a file with the attributes and data sets of a store, all values holes; returns where the data sets lie."""
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # a row written later moves nothing else in the file
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(part, "w", libver=LIBVER) as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "software": software, **ENCODING, **header.to_attrs()})
        sizes = layout(header, images, names.dtype.itemsize, class_names.dtype.itemsize)
        for name, (shape, dtype) in sizes.items():
            file.create_dataset(name, shape, dtype, dcpl=early)
        return places(file)


def _utf8(names: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """The names as UTF-8 strings of fixed width, that of the longest, in a type that HDF5 knows as UTF-8."""
    try:
        content = [name.encode() for name in names]
    except UnicodeEncodeError as error:
        raise QatError(f"the name {error.object!a} cannot be stored because it is not UTF-8: rename it") from None
    return np.array(content, h5py.string_dtype("utf-8", max(map(len, content))))
