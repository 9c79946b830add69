"""Paths that a command writes to, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from qat.errors import QatError

LONGEST = 200  # characters of a name; file systems take 255 bytes


def check_folder(option: str, path: Path | None) -> None:
    """Raise QatError, before any work, when the file ``path`` cannot be written."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise QatError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise QatError(f"{option} {path} cannot be written: give the name of a file in a folder that can")


def check_name(name: str | None) -> None:
    """Raise QatError for a name of a run that is no name of a folder below ``--runs``."""
    if name is None:
        return
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0\n") or len(name) > LONGEST:
        raise QatError(f"name is {name[:LONGEST]!r}: give one word, the name of a folder below --runs")
