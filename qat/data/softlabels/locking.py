"""One command at a time makes a store: a lock on a file beside it, for as long as the command runs.

HDF5 locks a file only while it is open. Between two openings, and while several processes write parts of their own,
another command could begin the same store anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qat.data.softlabels.rows import not_written
from qat.errors import QatError
from qat.locking import FileLock, LockedError


@contextmanager
def only_maker(out: Path) -> Iterator[None]:
    """Hold the lock of a store inside a ``with`` block; its file is removed at the end.

    Raises:
        QatError: another command makes the store, or nothing can be written beside it.
    """
    beside = out.with_name(f"{out.name}.lock")
    try:
        lock = FileLock(beside)
    except LockedError as owner:
        raise QatError(f"{out} is being made by {owner}: wait until it ends, or end it; its labels are kept") from None
    except OSError as error:
        raise not_written(beside, error) from None
    try:
        yield
    finally:
        with suppress(OSError):
            beside.unlink()  # while it is locked
        lock.release()
