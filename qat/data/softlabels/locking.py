"""One command at a time makes a store: a lock on a file beside it, for as long as the command runs.

HDF5 locks a file only while it is open. Between two openings, and while several processes write parts of their own,
another command could begin the same store anew.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qat.data.softlabels.rows import not_written
from qat.errors import QatError


@contextmanager
def only_maker(out: Path) -> Iterator[None]:
    """Hold the lock of a store inside a ``with`` block; its file is removed at the end.

    The lock belongs to this process, so that the system drops it however the process ends; workers that were forked do
    not keep it. On Windows, and on file systems without locks, nothing is locked here.

    Raises:
        QatError: another command makes the store, or nothing can be written beside it.
    """
    beside = out.with_name(f"{out.name}.lock")
    descriptor = _locked(beside, out)
    with suppress(OSError):  # a disk may be full; the lock holds all the same
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        with suppress(OSError):
            beside.unlink()  # while it is locked: a command that has just opened it notices that it is gone
        os.close(descriptor)


def _locked(beside: Path, out: Path) -> int:
    """The descriptor of the lock file, which this process has locked."""
    while True:
        try:
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise not_written(beside, error) from None
        if not _lock(descriptor):
            owner = os.read(descriptor, 200).decode(errors="replace") or "another command"
            os.close(descriptor)
            raise QatError(f"{out} is being made by {owner}: wait until it ends, or end it; its labels are kept")
        if sys.platform == "win32" or _leads_to(beside, descriptor):
            return descriptor
        os.close(descriptor)  # its owner has removed it in the meantime


def _lock(descriptor: int) -> bool:
    """Lock a file; False where another process has locked it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX permits both
        return False
    except OSError:
        return True  # this file system has no locks
    return True


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path leads to the file that is open."""
    try:
        there, here = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
