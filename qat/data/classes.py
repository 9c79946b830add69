"""The labels of the classes of a data set, and the data set itself.

| classes of the model | labels of the folders |
|---|---|
| known, from a checkpoint | by name; folders that are numbers are labels themselves, which is said |
| unknown | all of ImageNet where every name is a wnid, otherwise the folders: 2 before 10, other names as text |

``data.class_map`` gives them in either case, and ``data.classes: folders`` gives some folders of ImageNet labels of
their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from qat.data.class_map import read_class_map
from qat.data.folder import are_numbers, class_folders, find_images, find_loose_images, in_order, wnids
from qat.data.hub import hub_source
from qat.data.source import Source
from qat.data.splits import find_keys, find_source, has_split, place_of
from qat.data.tar import tar_source
from qat.errors import QatError
from qat.ranges import shown

ILSVRC = "ILSVRC2012_val_"  # how the validation images of ImageNet are called
MOST = 1_000_000  # classes of a model
log = logging.getLogger(__name__)


class TreeOptions(Protocol):
    """The options that say where images are and what their classes mean."""

    @property
    def root(self) -> Path | None: ...
    @property
    def val_labels(self) -> Path | None: ...
    @property
    def class_map(self) -> Path | None: ...
    @property
    def classes(self) -> str: ...


@dataclass(frozen=True)
class Classes:
    """Classes in label order.

    Args:
        names: of the classes, by label.
        labels: of the classes, by the name of their folder.
        known: the names are those of a model, so folders with numbers for names can stand for its labels.
    """

    names: tuple[str, ...]
    labels: Mapping[str, int]
    known: bool = False

    def of(self, source: Source) -> list[int]:
        """The label of every image; QatError for a class that is not among these."""
        keys = in_order(set(source.keys))
        labels = self.labels
        if source.numbered:
            labels = {key: int(key) for key in keys if int(key) < len(self.names)}
        elif self.known and not set(keys) & set(labels):
            labels = self._by_number(source, keys) or labels
        if (other := next((key for key in keys if key not in labels), None)) is not None:
            raise QatError(
                f"{source.place}: the class {shown(other)} is none of the {len(self.names)} of the "
                f"{'model' if self.known else 'training images'}, {_some(self.names)}: they must be the same, or "
                "data.class_map gives the label of each folder"
            )
        return [labels[key] for key in source.keys]

    def _by_number(self, source: Source, keys: Sequence[str]) -> dict[str, int]:
        """Labels where no name is that of a class: numbers, or the order of as many classes; said once."""
        found: dict[str, int] = {}
        if are_numbers(keys) and int(keys[-1]) < len(self.names):
            found = {key: int(key) for key in keys}
        elif len(source.classes) == len(self.names):
            found = {key: label for label, key in enumerate(source.classes)}
        if found:
            _warn_of_numbers(source.place, self.names)
        return found


@dataclass(frozen=True)
class Tree:
    """Images for training and for validation.

    Args:
        root: where they are; `qat.data.splits` lists the layouts.
        val_labels: file with the labels of validation images in one folder; found by its usual names when None.
        class_map: file with the label of every class folder.
        classes: what some folders of ImageNet are: ``auto``, classes among all 1,000; ``folders``, all classes.
    """

    root: Path
    val_labels: Path | None = None
    class_map: Path | None = None
    classes: str = "auto"

    @classmethod
    def of(cls, options: TreeOptions) -> Tree:
        """The tree that options describe; QatError without a root."""
        if options.root is None:
            raise QatError("data.root is not set: give the folder with train/<class>/*.JPEG and val/<class>/*.JPEG")
        return cls(Path(options.root), _path(options.val_labels), _path(options.class_map), options.classes)

    def source(self, split: str) -> Source:
        """The images of ``train`` or ``val``; QatError if there are none."""
        return find_source(self.root, split, self.val_labels)

    def has(self, split: str) -> bool:
        """Whether there is a place with images of ``train`` or ``val``."""
        return has_split(self.root, split)

    def place(self, split: str) -> Path:
        """The folder or file of a split."""
        return place_of(self.root, split)

    def keys(self) -> tuple[str, ...]:
        """The classes in order, as the folders of the training images call them, or of the validation images."""
        return find_keys(self.root, "train" if self.has("train") else "val", self.val_labels)

    def number(self, known: Sequence[str] = ()) -> Classes:
        """The classes: those of a model, if they are known, otherwise by training images, or by validation images.

        Raises:
            QatError: the class map does not fit, or there are no images.
        """
        if self.class_map is not None:
            return _mapped(self.class_map, tuple(known))
        if known:
            return _numbered(tuple(known), known=True)
        return _unknown(self)


def forget_listings() -> None:
    """List folders and tars anew when they are next asked for; a process otherwise lists each of them once."""
    for listing in (class_folders, find_images, find_loose_images, find_source, tar_source, hub_source, read_class_map,
                    _unknown, _warn_of_numbers):  # fmt: skip
        listing.cache_clear()


def _path(value: Path | None) -> Path | None:
    return None if value is None else Path(value)  # a config may hold text


def _numbered(names: Sequence[str], known: bool = False) -> Classes:
    return Classes(tuple(names), {name: label for label, name in enumerate(names)}, known)


@cache
def _unknown(tree: Tree) -> Classes:
    """The classes of a tree, where only the images are known."""
    folders = tree.keys()
    if are_numbers(folders) and (source := tree.source("train" if tree.has("train") else "val")).numbered:
        if int(folders[-1]) >= MOST:
            raise QatError(
                f"{source.place}: the label {folders[-1]} is too large: a model has at most {MOST:,} classes"
            )
        is_imagenet = all(name.rpartition("/")[2].startswith(ILSVRC) for name in source.names)
        return _numbered(wnids() if is_imagenet else [str(label) for label in range(int(folders[-1]) + 1)])
    return _numbered(wnids() if tree.classes == "auto" and set(folders) <= set(wnids()) else folders)


def _mapped(file: Path, known: tuple[str, ...]) -> Classes:
    """The labels of a class map; the classes have the names that the model knows, if any."""
    mapped = read_class_map(file)
    if known and len(known) != len(mapped):
        raise QatError(f"data.class_map: {file} has {len(mapped)} classes, the model {len(known)}")
    return replace(_numbered(mapped), names=known or mapped)


@cache
def _warn_of_numbers(place: Path, names: tuple[str, ...]) -> None:
    log.warning(
        "%s: the classes of the model, %s, cannot be matched by name, so the number of a class is taken as its label; "
        "data.class_map can give others", place, _some(names),
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
