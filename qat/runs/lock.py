"""One run folder, one writer."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from qat.errors import QatError
from qat.locking import FileLock, LockedError
from qat.runs.writing import cannot_write, remove_parts

NAME = "run.lock"


class FolderLock:
    """Excludes other processes from writing to the folder of a run, and removes what killed ones have left there.

    Raises:
        QatError: another process has the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._lock = FileLock(folder / NAME)
        except LockedError as owner:
            raise QatError(
                f"the run {folder} is being written by {owner}: wait until it has ended, or end it with kill, which "
                "lets it save; leave --ckpt out to start a new run"
            ) from None
        except OSError as error:
            raise cannot_write(folder / NAME, error) from None
        remove_parts(folder)

    def release(self, unused: bool = False) -> None:
        """Let other processes write to the folder. The file stays: another process may just have opened it.

        Args:
            unused: remove the folder first, if nothing was written there.
        """
        folder = self._lock.path.parent
        if unused:
            remove_unused(folder)
        self._lock.release()
        if unused and sys.platform == "win32":  # which does not remove files that are open
            remove_unused(folder)


def remove_unused(folder: Path) -> None:
    """Remove the folder of a run that was refused before it wrote anything, and that of its name if it is empty."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {NAME}:
            (folder / NAME).unlink(missing_ok=True)
            folder.rmdir()
            folder.parent.rmdir()
