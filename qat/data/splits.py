"""Finds the images of training and validation, however they are stored.

| ``data.root`` holds | images | classes |
|---|---|---|
| train/<class>/..., val/<class>/... | below the class folders | names of the folders |
| val/*.JPEG and a label file | in one folder | `qat.data.label_file` |
| train.tar, val.tar, or folders of tars | in tars, or in tars inside of tars | names of folders or of inner tars |
| hfds/PATH | a Hugging Face data set, by timm's reader | names of its label column |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

from qat.data.folder import (
    EXPECTED,
    check_split,
    class_folders,
    find_images,
    find_loose_images,
    in_order,
    is_image,
    scan,
)
from qat.data.hub import hub_source
from qat.data.label_file import find_label_file, read_label_file
from qat.data.source import Source
from qat.data.tar import SUFFIX, tar_source
from qat.errors import QatError

NAMES = {  # of folders and tars, as timm looks for them; and those of ImageNet as it is distributed
    "train": ("train", "training", "ILSVRC2012_img_train"),
    "val": ("val", "validation", "valid", "eval", "evaluation", "ILSVRC2012_img_val"),
}
HUB = "hfds"  # prefix of Hugging Face data sets, as in timm
STREAMS = ("wds", "tfds", "hfids")  # prefixes of timm whose readers have no list of images


def is_on_hub(root: Path) -> bool:
    """Whether the root stands for a Hugging Face data set."""
    return len(root.parts) > 1 and root.parts[0].lower() == HUB and not root.is_dir()


def place_of(root: Path, split: str) -> Path:
    """The folder, or the tar, of ``train`` or ``val`` under any of its usual names; root/<split> if there is none."""
    folders = [root / name for name in NAMES[split]]
    tars = [root / f"{name}.tar" for name in NAMES[split]]
    found = [folder for folder in folders if folder.is_dir()] + [tar for tar in tars if tar.is_file()]
    return found[0] if found else root / split


def has_split(root: Path, split: str) -> bool:
    """Whether the root has a place with images of ``train`` or ``val``."""
    if not is_on_hub(root):
        return place_of(root, split).exists()
    try:
        return bool(find_source(root, split))
    except QatError:
        return False


@cache
def find_source(root: Path, split: str, label_file: Path | None = None) -> Source:
    """The images of ``train`` or ``val``.

    Args:
        root: folder that holds both; hfds/PATH stands for a Hugging Face data set.
        split: train or val.
        label_file: labels of the images of val; found by its usual names when None.

    Raises:
        QatError: there are no images, or not all have a class.
    """
    if is_on_hub(root):
        return hub_source(Path(*root.parts[1:]), NAMES[split])
    _check_root(root)
    place = place_of(root, split)
    label_file = label_file if split == "val" else None
    layout = _layout(place)
    if layout == "tars":
        source: Source = tar_source(place)
        is_flat = split == "val" and len(set(source.keys)) < 2
        return _labelled(source, label_file) if label_file or is_flat else source
    check_split(place)
    if label_file or (split == "val" and layout == "flat"):
        return _labelled(loose_source(place), label_file)
    names = find_images(place)
    return Source(place, names, _first_parts(names))


def loose_source(folder: Path) -> Source:
    """All images below a folder, without classes; QatError if there is none."""
    return Source(folder, find_loose_images(folder))


def _check_root(root: Path) -> None:
    """QatError for a root that can hold no splits."""
    if len(root.parts) > 1 and root.parts[0].lower() in STREAMS and not root.is_dir():
        raise QatError(
            f"data.root is {root}: the readers of timm for {root.parts[0]}/ have no list of images, which the order of "
            f"training needs; give a folder with {EXPECTED} or with tars, or hfds/PATH"
        )
    if root.is_file():
        raise QatError(f"data.root {root} is a file: give the folder that holds train.tar and val.tar, or {EXPECTED}")


def find_keys(root: Path, split: str, label_file: Path | None = None) -> tuple[str, ...]:
    """The classes of ``train`` or ``val``, in the order of their labels; class folders may be empty.

    Takes what `find_source` takes, but lists no image in class folders, of which there can be a million.
    """
    place = place_of(root, split)
    if place.is_dir() and _layout(place) == "classes" and not (label_file and split == "val"):
        return class_folders(place)
    source = find_source(root, split, label_file)
    return tuple(source.classes or in_order(set(source.keys)))


def _layout(place: Path) -> Literal["tars", "flat", "classes"]:
    """How images are stored: in tars, in one folder (as those of Tiny-ImageNet in val/images), or in class folders."""
    if not place.is_dir():
        return "tars" if place.is_file() else "classes"
    folders: list[str] = []
    files: list[str] = []
    for entry in scan(place):
        if not entry.name.startswith("."):
            (folders if entry.is_dir() else files).append(entry.name)
    if not folders and any(map(is_image, files)):
        return "flat"
    if not folders and any(name.endswith(SUFFIX) for name in files):
        return "tars"
    return "flat" if folders == ["images"] and find_label_file(place) is not None else "classes"


def _labelled(source: Source, label_file: Path | None) -> Source:
    """The source with the classes of a label file, which images in one folder need."""
    file = label_file or find_label_file(source.place)
    if file is None:
        raise QatError(
            f"{source.place} holds images and no class folders: give the file of their labels as data.val_labels, such "
            "as val.txt with lines 'ILSVRC2012_val_00000001.JPEG 65', or sort the images into class folders"
        )
    keys, numbered = read_label_file(file, source.names)
    return replace(source, keys=keys, numbered=numbered)


def _first_parts(names: Sequence[str]) -> tuple[str, ...]:
    """The first folder of every name; equal ones are one string."""
    same: dict[str, str] = {}
    return tuple(same.setdefault(key, key) for key in (name.partition("/")[0] for name in names))
