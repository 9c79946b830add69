"""Writing a store of soft labels, so that a process killed at any moment loses no more than its last flush."""

from __future__ import annotations

import time
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from types import TracebackType

import h5py
import numpy as np

from qat.data.softlabels.store import Header, Row, open_store, sync
from qat.errors import QatError

FLUSH_SECONDS = 30.0
AT_ONCE = 2**26  # bytes of rows on their way to the disk, or copied in one go


class Writer:
    """Adds rows to a store in a thread of its own; an image counts as done when its row is on the disk.

    Args:
        path: of a store that `create` has made; QatError when another process writes it.
        flush_seconds: time between two flushes, so the most that is lost.
    """

    def __init__(self, path: Path, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.path = path
        self._file = open_store(path, "r+")
        self._ended = False  # no more rows will come
        self._done = self._file["done"][:]
        self._every = flush_seconds
        self._queue: Queue[tuple[int, Row] | None] = Queue(_rows(self._file))  # more make the teacher wait
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, name="soft labels", daemon=True)
        self._thread.start()

    def put(self, index: int, row: Row) -> None:
        """Hand over the row of an image; QatError if an earlier one could not be written."""
        self._raise()
        self._queue.put((index, row))

    def close(self) -> None:
        """Write and flush what was handed over."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        self._raise()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise QatError(f"cannot write {self.path}: {self._error}") from self._error

    def _work(self) -> None:
        try:
            while not self._ended:
                self._write_until(time.monotonic() + self._every)
        except BaseException as error:  # raised again where the rows come from
            self._error = error
            while not self._ended:  # nobody may wait for a place in the queue
                self._ended = self._queue.get() is None

    def _write_until(self, due: float) -> None:
        """Write the rows that come until then, and flush them."""
        written: list[int] = []
        while not self._ended and (left := due - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except Empty:
                break
            if item is None:
                self._ended = True
                continue
            index, row = item
            self._file["crops"][index], self._file["flip"][index] = row.packed()
            self._file["image_size"][index] = row.image_size
            written.append(index)
        if written:
            _flush(self._file)
            self._done[written] = 1
            low, high = min(written), max(written) + 1
            self._file["done"][low:high] = self._done[low:high]
            _flush(self._file)


def _rows(file: h5py.File) -> int:
    """How many rows are at work at once."""
    _, crops, columns = file["crops"].shape
    return max(1, min(1024, AT_ONCE // (2 * int(crops) * int(columns))))


def _flush(file: h5py.File) -> None:
    file.flush()
    sync(file)


def absorb(path: Path, part: Path) -> None:
    """Copy the finished rows of ``part`` that ``path`` lacks, then remove ``part``; QatError unless made alike."""
    with open_store(path, "r+") as file, open_store(part) as source:
        if Header.from_attrs(file.attrs, path) != Header.from_attrs(source.attrs, part):
            raise QatError(f"{part} was made with other arguments than {path}: remove one of them")
        new = source["done"][:].astype(bool) & ~file["done"][:].astype(bool)
        for low in range(0, len(new), run := _rows(file)):
            rows = slice(low, low + run)
            if not new[rows].any():
                continue
            for name in ("crops", "flip", "image_size"):
                both = file[name][rows]
                both[new[rows]] = source[name][rows][new[rows]]
                file[name][rows] = both
        _flush(file)
        file["done"][...] = (file["done"][:].astype(bool) | new).astype(np.uint8)
        _flush(file)
    part.unlink()
