"""Opening a store of soft labels: its lock, its layout, and its lists of names."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from errno import ENOLCK
from itertools import zip_longest
from pathlib import Path

import h5py
import numpy as np

from qat.data.softlabels.store import LIBVER, Header, layout
from qat.errors import QatError, first_line

LOCK_SECONDS = 5.0  # how long a lock is waited for


def open_store(path: Path, mode: str = "r") -> h5py.File:
    """Open a store and check its attributes and data sets.

    Raises:
        QatError: the file is missing, damaged, locked by another process, or not a store.
    """
    if not path.is_file():
        raise QatError(
            f"no soft labels {path}: qat make-softlabels makes them; an online teacher needs none "
            "(--data.softlabels null --model.teacher NAME)"
        )
    try:
        file = _when_unlocked(path, mode)
    except BlockingIOError:
        raise QatError(
            f"{path} is being written by another process, which may be left over from a stopped run: wait until it "
            "ends, or end it"
        ) from None
    except OSError as error:
        why = "it is cut off" if "truncated" in str(error) else first_line(error)
        if error.errno == ENOLCK:
            why = "its file system has no locks: set HDF5_USE_FILE_LOCKING=FALSE and start one process at a time"
        raise QatError(f"cannot read the soft labels {path}: {why}") from None
    try:
        _check_layout(file, Header.from_attrs(file.attrs, path), path)
    except BaseException:
        file.close()
        raise
    return file


def _when_unlocked(path: Path, mode: str) -> h5py.File:
    """Open a file; a lock is waited for a little, because a process that was killed keeps it for a moment."""
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
    """The first place where a stored list of names and the list on this machine differ, in words."""
    for theirs, ours in zip_longest(stored, given):
        if theirs != ours:
            return f"first, {'nothing' if ours is None else repr(ours)} is here where the labels have " + (
                "nothing" if theirs is None else repr(theirs)
            )
    return "the names agree, so the stored hash is wrong"
