"""A lock on a file, which the system drops when its process ends, however it ends.

The lock is of the POSIX kind, which belongs to one process: workers that were forked do not keep it after their parent
was killed. Windows, and some file systems of networks, have none; there nothing is locked.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

_held: set[Path] = set()  # by this process, whose own locks do not exclude each other


class LockedError(Exception):
    """Another process, which the text names, has the lock."""


class FileLock:
    """Holds the lock of a file, which is created where it is missing and says which process has it.

    Raises:
        LockedError: another process has the lock.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        if self.path in _held:  # a second descriptor of this process would lose the lock when it is closed
            raise LockedError(_name(os.getpid()))
        self._descriptor = _locked(self.path)
        while not os.fstat(self._descriptor).st_nlink:  # its last owner has removed it in between
            os.close(self._descriptor)
            self._descriptor = _locked(self.path)
        _held.add(self.path)
        with suppress(OSError):  # a disk may be full; the lock holds all the same
            os.truncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, _name(os.getpid()).encode())

    def release(self) -> None:
        """Let another process have the lock. Remove the file before, if at all: who has just opened it notices."""
        _held.discard(self.path)
        os.close(self._descriptor)


def _locked(path: Path) -> int:
    """The descriptor of a file that is locked now."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX permits both
        raise LockedError(os.read(descriptor, 200).decode(errors="replace") or "another process") from None
    except OSError:
        return  # this file system has no locks


def _name(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"
