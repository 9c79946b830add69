"""Files that are complete or not there: written beside the old one, which they replace at the end."""

from __future__ import annotations

import os
import sys
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
        path: file to write; its folder is made where it is missing. A link stays: what it leads to is replaced.
        mode: ``w`` or ``wb``.
        **options: for ``open``; text is UTF-8 with newlines as they are written.

    Raises:
        QatError: the file cannot be written; above all, the disk is full.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{target.name}.{os.getpid()}{PART}")  # another process may write the same file
    _open_parts.add(part)
    try:
        with writing(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open(mode, **{**text, **options}) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a full disk may show only here
            part.replace(target)
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
    """Remove what killed processes of this machine have left in a folder; other commands may be writing there."""
    for part in Path(os.path.realpath(folder)).glob(f"*.*{PART}"):
        writer = part.name.removesuffix(PART).rpartition(".")[2]
        if writer.isdecimal() and part not in _open_parts and not _is_running(int(writer)):
            with suppress(OSError):
                part.unlink()


def _is_running(process: int) -> bool:
    """Whether another process has this number; this one may have it by chance, as in a container."""
    if process == os.getpid() or sys.platform == "win32":  # Windows does not remove files that are open
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def remove_open_parts() -> None:
    """Remove the files that this process has not completed, before it ends without unwinding."""
    for part in list(_open_parts):
        with suppress(OSError):
            part.unlink()
