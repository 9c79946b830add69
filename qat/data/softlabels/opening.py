"""Opening a store of soft labels: its lock, its layout, and its lists of names."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from errno import ENOLCK
from itertools import zip_longest
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from qat.data.listing import OLDER_ORDER, in_older_order
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
        if "signature" in str(error):
            why = "it is no HDF5 file"
        if error.errno == ENOLCK:
            why = "its file system has no locks: set HDF5_USE_FILE_LOCKING=FALSE and start one process at a time"
        raise QatError(f"cannot read the soft labels {path}: {why}") from None
    try:
        _check_layout(file, Header.from_attrs(file.attrs, path), path)
    except BaseException:
        file.close()
        raise
    return file


def read_done(path: Path) -> npt.NDArray[np.bool_]:
    """(N,), which images have labels, also while another process writes the store.

    Raises:
        QatError: it cannot be read.
    """
    try:
        with h5py.File(path, locking=False) as file:
            return np.asarray(file["done"][:], dtype=bool)
    except (OSError, KeyError) as error:
        raise QatError(f"cannot read the soft labels {path}: {first_line(error)}") from None


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as one of HDF5 does."""
    return bool(h5py.is_hdf5(path))


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
    images = _own(file, "done", path).shape[0]
    widths = [_own(file, name, path).dtype.itemsize for name in ("path", "class_name")]
    end = 0
    for name, (shape, dtype) in layout(header, images, *widths).items():
        data = _own(file, name, path)
        if data.shape != shape or data.dtype != np.dtype(dtype):
            raise QatError(f"{path}: {name} is {data.dtype} {data.shape}, expected {np.dtype(dtype)} {shape}")
        if data.chunks is not None or data.id.get_offset() is None:
            raise QatError(f"{path}: {name} is not contiguous; copy it with h5repack -l CONTI")
        end = max(end, data.id.get_offset() + data.id.get_storage_size())
    if (size := path.stat().st_size) < end:
        raise QatError(f"cannot read the soft labels {path}: it is cut off, {size} of {end} bytes are there")


def _own(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """A data set of this very file with one row or more; QatError if there is none, or only a link to another file."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise QatError(f"{path} lacks the data set {name!r} of a store of soft labels")
    if not file[name].shape or not file[name].size:
        raise QatError(f"{path} is damaged: its data set {name!r} is empty")
    return file[name]


def check_lists(file: h5py.File, path: Path) -> None:
    """Compare the lists of a store with each other, and with the hashes that were taken when it was made.

    Raises:
        QatError: names were changed, reordered or doubled, or a target is not the class of its image.
    """
    names: dict[str, list[bytes]] = {name: file[name][:].tolist() for name in ("class_name", "path")}
    for name, hashed in (("class_name", "class_list_sha256"), ("path", "path_list_sha256")):
        if hashlib.sha256(b"".join(b"%s\n" % value for value in names[name])).hexdigest() != file.attrs[hashed]:
            raise QatError(
                f"{path} is damaged: its list {name!r} has other names, or another order, than {hashed} says"
            )
        if len(set(names[name])) < len(names[name]):
            double = next(value for value, count in Counter(names[name]).items() if count > 1)
            raise QatError(f"{path} is damaged: its list {name!r} has {double.decode(errors='replace')!r} twice")
    number = {name: place for place, name in enumerate(names["class_name"])}
    for image, target in zip(names["path"], file["target"][:].tolist(), strict=True):
        if target >= len(number) or number.get(image.partition(b"/")[0], target) != target:
            name = image.decode(errors="replace")
            raise QatError(f"{path} is damaged: the target of {name!r} is {target}, which is not its class")


def names_in(file: h5py.File, name: str) -> Iterator[str]:
    """The strings of ``path`` or ``class_name``."""
    return (value.decode() for value in file[name][:])


def first_difference(stored: Iterable[str], given: Sequence[str]) -> str:
    """The first place where a stored list of names and the list on this machine differ, in words."""
    stored = list(stored)
    hint = f"; {OLDER_ORDER}: make the labels again" if in_older_order(stored, list(given)) else ""
    for theirs, ours in zip_longest(stored, given):
        if theirs != ours:
            return f"first, {'nothing' if ours is None else repr(ours)} is here where the labels have " + (
                ("nothing" if theirs is None else repr(theirs)) + hint
            )
    return "the names agree, so the stored hash is wrong"
