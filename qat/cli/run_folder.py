"""The folder that a training run, or a calibration, writes to: found or made once, locked while the command runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from qat.cli.run_of_ckpt import Origin
from qat.runs.folder import fresh_folder, parent_of_runs, unfinished_folder
from qat.runs.lock import FolderLock
from qat.runs.process import first_process


class RunFolder:
    """The folder of one command; ``path`` is None until it is opened."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._lock: FolderLock | None = None
        self._new_root: Path | None = None  # ``--runs``, where this command has made it

    def open(self, config: Any, origin: Origin, name: str | None) -> Path:
        """The folder: that of the run which goes on, or a new one.

        Of several processes only the first makes a new folder and locks it; only that one writes there.

        Args:
            config: all options of the command.
            origin: the run that goes on, or whose checkpoint the new run starts from.
            name: of the run; None takes that of the run before, or of the model.

        Raises:
            QatError: another process writes to the folder, or it cannot be written.
        """
        resume = config.get("resume")
        if self.path is None:
            if origin.goes_on and origin.ckpt is not None:
                self.path = origin.ckpt.parent
            else:
                before = origin.ckpt.resolve().parent.parent.name if origin.ckpt and origin.config else None
                model = Path(config.model.arch.rpartition(":")[2]).name  # it may name a folder or a repository
                if origin.resumed is not None:
                    self.path = origin.resumed
                elif resume is not None:  # it stands in a config
                    self.path = unfinished_folder(resume.expanduser(), config.runs, name)
                else:
                    self.path = self._made(config.runs, name or before or model)
            self._lock = FolderLock(self.path) if first_process() else None
        return self.path

    def _made(self, runs: Path, name: str) -> Path:
        parent = parent_of_runs(runs, name)
        self._new_root = None if runs.exists() else runs
        return fresh_folder(parent) if first_process() else parent

    def close(self, refused: bool) -> None:
        """Let other commands write there; leave no folder of a command that was refused before it wrote anything."""
        if self._lock is not None and self.path is not None:
            self._lock.release(unused=refused)
            if refused and self._new_root is not None:
                with suppress(OSError):  # other runs are there by now
                    self._new_root.rmdir()
