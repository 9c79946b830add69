"""Lists folders of images on disk: root/{train,val}/<class>/<image>, or images alone. No image is opened.

Listings are cached. Links are followed, and every folder is listed once, so that a link to a folder above it ends.
Only regular files are images: to open a FIFO or a socket could wait forever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from qat.errors import QatError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif", ".avif",
            ".heic", ".heif")  # fmt: skip  # HEIF is listed so that it is reported rather than left out
EXPECTED = "train/<class>/*.JPEG and val/<class>/*.JPEG"
DIGITS = 18  # of the largest number that a class can be; a longer one is a name
log = logging.getLogger(__name__)


def is_image(name: str) -> bool:
    """Whether a file is an image, judged by the suffix of its name; hidden files are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 ILSVRC-2012 class names in the order of their labels, which is the sorted order."""
    from timm.data.imagenet_info import ImageNetInfo  # timm loads torchvision, which takes a second

    names: list[str] = ImageNetInfo().label_names()
    assert names == sorted(set(names))
    return tuple(names)


@cache
def descriptions() -> dict[str, str]:
    """The ILSVRC-2012 classes in words, by wnid: ``tench, Tinca tinca``."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return {name: info.label_name_to_description(name) for name in wnids()}


def in_order(classes: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: numbers by their value, as 2 before 10, other names as text."""
    names = sorted(classes)
    return sorted(names, key=int) if are_numbers(names) else names


def are_numbers(names: Iterable[str]) -> bool:
    """Whether every name is a number, such as 17."""
    return all(len(name) <= DIGITS and name.isascii() and name.isdecimal() for name in names)


@cache
def class_folders(split: Path) -> tuple[str, ...]:
    """Names of the class folders of root/train or root/val, in order; QatError if there is none."""
    check_split(split)
    folders = in_order(entry.name for entry in scan(split) if not entry.name.startswith(".") and entry.is_dir())
    if not folders:
        raise QatError(f"{split} has no class folder: expected {split}/<class>/*.JPEG{_nearby(split)}")
    return tuple(folders)


def check_split(split: Path) -> None:
    """QatError, with a place that looks better, for a root or a folder root/train or root/val that does not exist."""
    root, name = split.parent, split.name
    if not root.is_dir():
        raise QatError(f"data.root {root} is not a folder: expected one with {EXPECTED}")
    if not split.is_dir():
        raise QatError(f"data.root {root} has no {name!r} folder: expected {split}/<class>/*.JPEG{_nearby(split)}")


@cache
def find_images(split: Path) -> tuple[str, ...]:
    """Paths relative to the split, sorted by class, then by name; QatError for a class without an image.

    All images below a class folder belong to its class.
    """
    found: list[str] = []
    for folder in class_folders(split):
        names = sorted(_below(split / folder))
        if not names:
            raise QatError(f"class folder {split / folder} has no image: expected files that end in {_suffixes()}")
        found += [f"{folder}/{name}" for name in names]
    if beside := [entry.name for entry in scan(split) if is_image(entry.name) and entry.is_file()]:
        log.warning("%d images of %s, such as %s, are in no class folder: not used", len(beside), split, beside[0])
    return tuple(found)


@cache
def find_loose_images(folder: Path) -> tuple[str, ...]:
    """Sorted relative paths of all images below a folder; QatError if there is none."""
    if not folder.is_dir():
        raise QatError(f"{folder} is not a folder: expected one with images that end in {_suffixes()}")
    found = sorted(_below(folder))
    if not found:
        raise QatError(f"{folder} has no image: expected files that end in {_suffixes()}")
    return tuple(found)


def class_names(split: Path) -> list[str]:
    """Classes in label order: all 1,000 wnids if the name of every folder is one, otherwise the folder names."""
    folders = class_folders(split)
    return list(wnids() if set(folders) <= set(wnids()) else folders)


def _below(folder: Path) -> Iterator[str]:
    """Relative paths, with slashes, of all images below a folder; a folder that several links lead to counts once."""
    seen, todo = set(), [""]
    while todo:
        here = todo.pop()
        found = os.stat(folder / here)
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        deeper = []
        for entry in scan(folder / here):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                deeper.append(f"{here}{entry.name}/")
            elif is_image(entry.name) and _is_file(entry):
                yield f"{here}{entry.name}"
        todo += sorted(deeper, reverse=True)  # in order, so that it is always the same one of several links


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file; a link that leads nowhere is listed, so that it is reported as unreadable."""
    if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
        return True
    log.warning("skipped %s: it is not a regular file", entry.path)
    return False


def _nearby(split: Path) -> str:
    """A hint where the split is, for a root that lies one folder too high or too low."""
    root, name = split.parent, split.name
    inside = [entry.name for entry in scan(root) if entry.is_dir() and Path(entry.path, name).is_dir()]
    if root.name == name or (root.parent / name).is_dir():
        return f"; give {root.parent} as data.root"
    return f"; give {root / inside[0]} as data.root" if len(inside) == 1 else ""


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; QatError if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise QatError(f"cannot list {folder}: {error.strerror}") from error


def _suffixes() -> str:
    return " ".join(SUFFIXES)
