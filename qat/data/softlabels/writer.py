"""Writing a store of soft labels; a process that is killed loses what it has labeled since the last flush, no more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from types import TracebackType

import h5py
import numpy as np
import numpy.typing as npt

from qat.data.softlabels.opening import open_store
from qat.data.softlabels.rows import RowFile, not_written, places
from qat.data.softlabels.store import Header, ImageLabels
from qat.errors import QatError

FLUSH_SECONDS = 30.0
AT_ONCE = 2**26  # bytes of labels that wait to be written, or are copied at a time


class Writer:
    """Writes labels to a store in a thread of its own; an image is marked as done when its labels are on the disk.

    Args:
        path: a store that `create` has made.
        flush_seconds: time between two flushes, and so the most work that a kill can cost.

    Raises:
        QatError: another process is writing the store.
    """

    def __init__(self, path: Path, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.path = path
        self._file = open_store(path, "r+")  # nothing is written through HDF5; its lock keeps others away
        self._done = self._file["done"][:]
        self._rows = RowFile(path, places(self._file))
        self._ended = False  # no more labels will come
        self._every = flush_seconds
        self._queue: Queue[tuple[int, ImageLabels] | None] = Queue(
            _rows_at_once(self._file)
        )  # when it is full, the teacher waits
        self._error: Exception | None = None
        self._thread = Thread(target=self._work, name="soft labels", daemon=True)
        self._thread.start()

    def put(self, index: int, labels: ImageLabels) -> None:
        """Hand over the labels of an image; QatError if earlier ones could not be written."""
        self._raise()
        self._queue.put((index, labels))

    def close(self) -> None:
        """Write and flush everything that was handed over; QatError if that fails."""
        self._queue.put(None)
        self._thread.join()
        self._rows.close()
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
            raise not_written(self.path, self._error) from self._error

    def _work(self) -> None:
        try:
            while not self._ended:
                self._write_until(time.monotonic() + self._every)
        except Exception as error:  # raised again in `put` and `close`
            self._error = error
            while not self._ended:  # empty the queue, so that `put` does not wait for ever
                self._ended = self._queue.get() is None

    def _write_until(self, due: float) -> None:
        """Write the labels that arrive before the time ``due``, and flush them, also when the disk becomes full."""
        written: list[int] = []
        try:
            while not self._ended and (left := due - time.monotonic()) > 0:
                try:
                    item = self._queue.get(timeout=left)
                except Empty:
                    break
                if item is None:
                    self._ended = True
                    continue
                self._write(*item)
                written.append(item[0])
        finally:
            if written:
                self._mark(written)

    def _write(self, index: int, labels: ImageLabels) -> None:
        crops, flips = labels.packed()
        self._rows.write("crops", index, crops[None])
        self._rows.write("flip", index, flips[None])
        self._rows.write("image_size", index, np.array([labels.image_size], np.uint16))

    def _mark(self, written: list[int]) -> None:
        """Mark images as done, once their labels are on the disk."""
        self._rows.sync()
        self._done[written] = 1
        low, high = min(written), max(written) + 1
        self._rows.write("done", low, self._done[low:high])
        self._rows.sync()


def _rows_at_once(file: h5py.File) -> int:
    """How many rows have `AT_ONCE` bytes."""
    _, crops, columns = file["crops"].shape
    return max(1, min(1024, AT_ONCE // (2 * int(crops) * int(columns))))


def absorb(path: Path, part: Path) -> None:
    """Copy the finished rows of the store ``part`` that the store ``path`` lacks, then remove ``part``.

    Raises:
        QatError: the two stores have different headers, or the disk is full; ``part`` is kept then.
    """
    with open_store(path, "r+") as file, open_store(part) as source:
        if Header.from_attrs(file.attrs, path) != Header.from_attrs(source.attrs, part):
            raise QatError(f"{part} was made with other options than {path}: remove one of them")
        done = file["done"][:].astype(bool)
        new = source["done"][:].astype(bool) & ~done
        try:
            with RowFile(path, places(file)) as rows:
                _copy(source, rows, new, _rows_at_once(file))
                rows.sync()
                rows.write("done", 0, (done | new).astype(np.uint8))
                rows.sync()
        except OSError as error:
            raise not_written(path, error) from None
    part.unlink()


def _copy(source: h5py.File, rows: RowFile, chosen: npt.NDArray[np.bool_], at_once: int) -> None:
    """Copy the rows ``chosen`` (N,) of all labels, reading so many rows at once."""
    for low in range(0, len(chosen), at_once):
        some = chosen[low : low + at_once]
        if not some.any():
            continue
        for name in ("crops", "flip", "image_size"):
            content = source[name][low : low + at_once]
            for run in _runs(some):
                rows.write(name, low + run.start, content[run])


def _runs(chosen: npt.NDArray[np.bool_]) -> Iterator[slice]:
    """The longest slices in which every element is true."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).tolist()
    return (slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True))
