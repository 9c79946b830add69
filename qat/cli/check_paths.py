"""Paths that a command writes to, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from qat.errors import QatError

KEPT = (
    ".ckpt",
    ".safetensors",
    ".pth",
    ".pt",
    ".bin",
    ".h5",
    ".hdf5",
    ".yaml",
    ".yml",
)  # no table replaces such a file
LONGEST = 200  # characters of a name; file systems take 255 bytes


def check_folder(option: str, path: Path | None) -> None:
    """Raise QatError, before any work, when the file ``path`` cannot be written."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise QatError(f"{option} {path}: there is no folder {path.parent}")
    target = Path(os.path.realpath(path))  # a link is followed
    irregular = os.path.exists(path) and not os.path.isfile(path)  # a folder, a device, a pipe
    if irregular or not os.access(target.parent, os.W_OK):
        raise QatError(f"{option} {path} cannot be written: give the name of a file in a folder that can")
    if path.exists() and {path.suffix.lower(), target.suffix.lower()} & set(KEPT):
        raise QatError(f"{option} {path} exists and is no table: give another name")


def check_name(name: str | None) -> None:
    """Raise QatError for a name of a run that is no name of a folder below ``--runs``."""
    if name is None:
        return
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0\n") or len(name) > LONGEST:
        raise QatError(f"name is {name[:LONGEST]!r}: give one word, the name of a folder below --runs")
