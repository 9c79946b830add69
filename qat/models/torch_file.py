"""Files that torch.save wrote. Reading one calls nothing that it names: what is not a tensor becomes a placeholder.

Training files of other projects hold objects beside their weights: options (``argparse.Namespace``), a configuration
(yacs in Swin's), a number of NumPy. `read_plain` refuses them, as torch does with ``weights_only=True``; `read_foreign`
puts a `Foreign` in their place.
"""

from __future__ import annotations

import pickle
import re
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from qat.models.inert import InertPickle

ANSI = re.compile(r"\x1b\[[0-9;]*m")
REFUSED_CLASS = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_intact: set[tuple[int, ...]] = set()  # versions of files whose checksums are right
NEWER = "Unsupported operand"  # of a protocol of pickle that torch does not read in this way
REFUSED = re.compile(r"WeightsUnpickler error: (.+)")


def read_plain(path: Path, mmap: bool = False) -> Any:
    """The content of a file that holds tensors and plain data; other classes raise an error (see `reason`).

    Args:
        path: a file that torch.save wrote.
        mmap: leave the tensors on the disk until they are used.
    """
    check_sums(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_foreign(path: Path) -> Any:
    """The content of a file, with a `Foreign` in place of everything that is neither a tensor nor plain data."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return read_plain(path)
    except pickle.UnpicklingError as error:
        if not REFUSED_CLASS.search(str(error)) and NEWER not in str(error):
            raise
    if is_program(path):
        raise pickle.UnpicklingError("it is an archive of TorchScript, or a tar of torch's oldest format")
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=InertPickle)


def is_program(path: Path) -> bool:
    """Whether torch.load would hand a file to another reader than the unpickler that it is given.

    `read_plain` refuses these in another way, so that this is asked in vain as long as torch does not change.
    """
    if not zipfile.is_zipfile(path):
        return tarfile.is_tarfile(path)
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())


def check_sums(path: Path) -> None:
    """Compare the checksums in a file, which torch does not look at; once for a file that stays the same.

    Raises:
        UnpicklingError: a part of it has another checksum.
    """
    found = path.stat()
    version = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
    if version in _intact or not zipfile.is_zipfile(path):  # torch's first format has no checksums
        return
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise pickle.UnpicklingError(f"{damaged} has another checksum, so the file is damaged")
    _intact.add(version)


def reason(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    text = ANSI.sub("", str(error))
    if isinstance(error, EOFError | KeyError):  # of the unpickler, which does not say what it has met
        return "it is empty, cut off, or no file that torch has saved"
    if found := REFUSED_CLASS.search(text):
        return f"it holds a {found[1]}, which is neither a tensor nor plain data, and reading it could run code"
    if found := REFUSED.search(text):  # torch tells first at length how to read the file all the same
        return found[1]
    return (text.splitlines() or [type(error).__name__])[0]
