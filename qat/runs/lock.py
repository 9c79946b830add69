"""One run folder, one writer: a lock that the system drops when its process ends, however it ends."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from qat.errors import QatError
from qat.runs.writing import cannot_write, remove_parts

NAME = "run.lock"
_held: set[Path] = set()  # by this process, whose own locks do not exclude each other


class FolderLock:
    """Excludes other processes from writing to the folder of a run, and removes what killed ones have left there.

    The lock is of the POSIX kind, which belongs to one process: the workers of a loader, which are forked, do not keep
    it after their parent was killed. Windows, and some file systems of networks, have none; there nothing is locked.

    Raises:
        QatError: another process has the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = (folder / NAME).resolve()
        if self.path in _held:
            raise self._taken(str(os.getpid()))
        self._open()
        while not os.fstat(self._file).st_nlink:  # its last owner has removed it in between, as unused
            os.close(self._file)
            self._open()
        _held.add(self.path)
        with suppress(OSError):  # a disk may be full; the lock holds all the same
            os.truncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)  # Windows has no pwrite
            os.write(self._file, f"{os.getpid()} on {socket.gethostname()}".encode())
        remove_parts(folder)

    def release(self, unused: bool = False) -> None:
        """Let other processes write to the folder. The file stays: another process may just have opened it.

        Args:
            unused: remove the folder first, if nothing was written there.
        """
        if unused:
            remove_unused(self.path.parent)
        _held.discard(self.path)
        os.close(self._file)
        if unused and sys.platform == "win32":  # which does not remove files that are open
            remove_unused(self.path.parent)

    def _open(self) -> None:
        """Open the file and lock it."""
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        try:
            self._lock()
        except QatError:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX permits both
            raise self._taken(os.pread(self._file, 200, 0).decode(errors="replace")) from None
        except OSError:
            return  # this file system has no locks

    def _taken(self, owner: str) -> QatError:
        return QatError(
            f"the run {self.path.parent} is being written by process {owner or '(unknown)'}: wait until it has ended, "
            "or end it with kill, which lets it save; leave --ckpt out to start a new run"
        )


def remove_unused(folder: Path) -> None:
    """Remove the folder of a run that was refused before it wrote anything, and that of its name if it is empty."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {NAME}:
            (folder / NAME).unlink(missing_ok=True)
            folder.rmdir()
            folder.parent.rmdir()
