"""Files that are complete or not there: written beside the old one, which they replace at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from qat.errors import QatError, first_line

PART = ".part"
_open_parts: set[Path] = set()


@contextmanager
def replacing(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a new file that replaces ``path`` when the block ends; after an error it is removed and ``path`` stays.

    Args:
        path: file to write; its folder is made where it is missing.
        mode: ``w`` or ``wb``.
        **options: for ``open``; text is UTF-8 with newlines as they are written.

    Raises:
        QatError: the file cannot be written; above all, the disk is full.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")  # another process may write the same file
    _open_parts.add(part)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open(mode, **{**text, **options}) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a full disk may show only here
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()
        _open_parts.discard(part)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a QatError that names the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> QatError:
    """The error for a file that could not be written, with the way out."""
    return QatError(
        f"cannot write {path}: {error.strerror or first_line(error)}; what was there before is kept: make space or "
        "permit writing, then run the command again, a training run with --ckpt last"
    )


def remove_parts(folder: Path) -> None:
    """Remove what killed processes have left in a folder that no other process writes to."""
    for part in folder.glob(f"*{PART}"):
        with suppress(OSError):
            part.unlink()


def remove_open_parts() -> None:
    """Remove the files that this process has not completed, before it ends without unwinding."""
    for part in list(_open_parts):
        with suppress(OSError):
            part.unlink()
