"""Lists class-folder trees on disk: root/{train,val}/<class>/<image>. Listings are cached, and no image is opened."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from qat.errors import QatError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


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
def class_folders(split: Path) -> tuple[str, ...]:
    """Sorted names of the class folders of root/train or root/val; QatError if there is none."""
    root, name = split.parent, split.name
    if not root.is_dir():
        raise QatError(
            f"data.root {root} is not a folder: expected one with train/<class>/*.JPEG and val/<class>/*.JPEG"
        )
    if not split.is_dir():
        raise QatError(f"data.root {root} has no {name!r} folder: expected {split}/<class>/*.JPEG")
    folders = sorted(entry.name for entry in _scan(split) if not entry.name.startswith(".") and entry.is_dir())
    if not folders:
        raise QatError(f"{split} has no class folder: expected {split}/<class>/*.JPEG")
    return tuple(folders)


@cache
def find_images(split: Path) -> tuple[str, ...]:
    """Paths ``<class>/<file>`` relative to the split, sorted by class, then file; QatError for a class without one."""
    found: list[str] = []
    for folder in class_folders(split):
        names = sorted(e.name for e in _scan(split / folder) if is_image(e.name) and not e.is_dir())
        if not names:
            raise QatError(f"class folder {split / folder} has no image: expected files that end in {_suffixes()}")
        found += [f"{folder}/{name}" for name in names]
    return tuple(found)


@cache
def find_loose_images(folder: Path) -> tuple[str, ...]:
    """Sorted relative paths of all images below a folder; links to folders are not followed; QatError if none."""
    if not folder.is_dir():
        raise QatError(f"{folder} is not a folder: expected one with images that end in {_suffixes()}")
    found: list[str] = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(Path(here, name)).relative_to(folder).as_posix() for name in names if is_image(name)]
    if not found:
        raise QatError(f"{folder} has no image: expected files that end in {_suffixes()}")
    return tuple(sorted(found))


def class_names(split: Path) -> list[str]:
    """Classes in label order: all 1,000 wnids if the name of every folder is one, otherwise the sorted folder names."""
    folders = class_folders(split)
    return list(wnids() if set(folders) <= set(wnids()) else folders)


def class_names_of(root: Path) -> list[str]:
    """Classes of a root with train and val; QatError if val has a class that train's list lacks."""
    names = class_names(root / "train")
    if extra := sorted(set(class_folders(root / "val")) - set(names)):
        raise QatError(
            f"{root / 'val' / extra[0]} has no counterpart {root / 'train' / extra[0]}: classes must be the same"
        )
    return names


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise QatError(f"cannot list {folder}: {error.strerror}") from error


def _suffixes() -> str:
    return " ".join(SUFFIXES)
