"""The file that labels go to: whether it can be written, creating it, and going on with one that exists."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch

import qat
from qat.data.softlabels.opening import check_lists, first_difference, is_hdf5, names_in, open_store
from qat.data.softlabels.store import Header, create, row_bytes
from qat.errors import QatError

OPTIONS = {  # attributes of a store whose options have other names
    "num_crops": "crops",
    "top_k": "topk",
    "flip_p": "flip",
    "teacher_sha256": "teacher_checkpoint",
    "teacher_interpolation": "interpolation",
}


def beside(out: Path, ending: str) -> list[Path]:
    """Sorted files beside ``out`` whose name is that of ``out`` followed by a match of the expression ``ending``."""
    return sorted(path for path in out.parent.iterdir() if re.fullmatch(re.escape(out.name) + ending, path.name))


def parts_of(out: Path) -> list[Path]:
    """The stores of single processes that were not copied into ``out`` yet."""
    return beside(out, r"\.rank\d+")


def check_out(out: Path) -> None:
    """QatError for a file that cannot be written."""
    if out.is_dir():
        raise QatError(f"out is {out}, a folder: give the name of a file")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise QatError(f"out is {out}: there is no folder {out.parent} that can be written")
    if out.exists() and not (out.is_file() and os.access(out, os.R_OK | os.W_OK)):
        raise QatError(f"out is {out}, which is not a file that can be read and written: give another name")
    if out.is_file() and not is_hdf5(out):
        raise QatError(f"out is {out}, which exists and is no store of soft labels: give another name")


def prepare(
    out: Path,
    header: Header,
    paths: Sequence[str],
    classes: Sequence[str],
    targets: Sequence[int],
    processes: int = 1,
) -> None:
    """Create a store, or check one that exists; an existing one without labels is created anew.

    Args:
        out: the file.
        header: how the labels will be made.
        paths: of the images.
        classes: names of the classes, in the order of their numbers.
        targets: number of the class of every image.
        processes: how many of them make the labels; the space is reserved for one, and only looked for otherwise.

    Raises:
        QatError: the store has labels of other images or of other options, or the disk has too little space.
    """
    if not out.exists() or _is_empty(out):
        _check_space(out, len(paths) * row_bytes(header), processes)
        create(out, header, paths, classes, software(), processes == 1, targets)
    with open_store(out) as file:
        check_lists(file, out)
        stored = Header.from_attrs(file.attrs, out)
        if stored.path_list_sha256 != header.path_list_sha256:
            difference = first_difference(names_in(file, "path"), paths)
            raise QatError(
                f"out is {out}, whose labels were made on other images than those of data.root: {difference}"
            )
    pairs = [(field.name, getattr(stored, field.name), getattr(header, field.name)) for field in fields(Header)]
    different = [f"{OPTIONS.get(name, name)} {theirs} -> {ours}" for name, theirs, ours in pairs if theirs != ours]
    if different:
        raise QatError(
            f"out is {out}, which was begun with other options ({', '.join(different)}): "
            "give those again to continue it, or give another file"
        )


def _check_space(out: Path, size: int, processes: int) -> None:
    """QatError unless there is space for labels of this many bytes.

    The parts of several processes have all labels once, and each is removed when it has been copied into ``out``.
    """
    needed = size + (size // processes if processes > 1 else 0)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        unit, bytes_ = ("GB", 1e9) if needed > 1e9 else ("MB", 1e6)
        raise QatError(
            f"out is {out}: {needed / bytes_:.1f} {unit} are needed, {free / bytes_:.1f} {unit} are free there"
        )


def _is_empty(out: Path) -> bool:
    """Whether neither the store nor a part that a process left has labels."""
    with open_store(out) as file:
        return not file["done"][:].any() and not parts_of(out)


def software() -> str:
    """The versions that make a store, for information only."""
    return f"qat {qat.__version__}, torch {torch.__version__}, timm {version('timm')}"
