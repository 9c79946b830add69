"""Files that torch writes, complete or not there."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch

from qat.runs.writing import replacing


def save_replacing(content: Any, path: Path) -> None:
    """Write a content beside ``path``, flush it to the disk, and rename it; QatError where it cannot be written."""
    with replacing(path, "wb") as file:
        noting = NotingErrors(file)
        try:
            torch.save(content, noting)  # type: ignore[arg-type]
        except RuntimeError:
            if noting.error is None:
                raise
            raise noting.error from None


class NotingErrors:
    """A file whose first OSError is remembered: torch replaces it by one of its own about its position in the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Hand over what is buffered."""
        self.file.flush()
