"""Writing rows of a store past HDF5, at the places that HDF5 has given them.

HDF5 cannot be trusted with a full disk: an error while it closes a data set is swallowed, the row counts as written,
and the process crashes when it ends. These writes go to the system directly, and each says whether it worked.
"""

from __future__ import annotations

import os
from errno import EINVAL, ENOSYS, EOPNOTSUPP
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from qat.errors import QatError, first_line

UNKNOWN_THERE = {EINVAL, ENOSYS, EOPNOTSUPP}  # a file system, or a C library, without reservations


class Place(NamedTuple):
    """Where the rows of a data set lie in the file."""

    start: int  # bytes before the first row
    rows: int
    shape: tuple[int, ...]  # of a row
    dtype: np.dtype[Any]


def places(file: h5py.File) -> dict[str, Place]:
    """The place of every data set of a store, whose data sets are contiguous."""
    return {
        name: Place(data.id.get_offset(), data.shape[0], data.shape[1:], data.dtype)
        for name, data in file.items()
        if isinstance(data, h5py.Dataset)
    }


class RowFile:
    """Writes rows at the given places of a file that has its full length already.

    Args:
        path: the file.
        places: of its data sets, as `places` finds them.
    """

    def __init__(self, path: Path, places: dict[str, Place]) -> None:
        self._places = places
        self._descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # text would be changed on Windows

    def write(self, name: str, first: int, rows: npt.NDArray[Any]) -> None:
        """Write consecutive rows of a data set.

        Args:
            name: of the data set.
            first: number of the first row.
            rows: (n, ...), of the type of the data set.

        Raises:
            OSError: the disk is full, or gone.
        """
        start, count, shape, dtype = self._places[name]
        if rows.shape[1:] != shape or rows.dtype != dtype or not 0 <= first <= count - len(rows):
            raise ValueError(
                f"{rows.dtype} {rows.shape} from row {first} on does not fit {name}, {dtype} {(count, *shape)}"
            )
        at = start + first * dtype.itemsize * int(np.prod(shape))
        content = memoryview(rows.tobytes())
        while content:
            written = _write_at(self._descriptor, content, at)
            content, at = content[written:], at + written

    def reserve(self) -> None:
        """Take the space of the whole file, so that the disk cannot become full later.

        Where a file system, or the operating system, has no reservations, nothing happens.

        Raises:
            OSError: there is too little space.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._descriptor, 0, os.fstat(self._descriptor).st_size)
        except OSError as error:
            if error.errno not in UNKNOWN_THERE:
                raise

    def sync(self) -> None:
        """Wait until everything that was written is on the disk; OSError if it is not."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; what was not synced may still be lost."""
        os.close(self._descriptor)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_at(descriptor: int, content: memoryview, at: int) -> int:
    """Write at a place of a file; how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, at)
    os.lseek(descriptor, at, os.SEEK_SET)  # Windows
    return os.write(descriptor, content)


def not_written(path: Path, error: Exception) -> QatError:
    """The error to show when a store could not be written."""
    why = first_line(error)
    if isinstance(error, OSError) and error.errno:
        why = os.strerror(error.errno)  # HDF5's own text has many lines
    return QatError(f"cannot write {path}: {why}; labels made so far are kept, the same command goes on from there")
