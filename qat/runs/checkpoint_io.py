"""Checkpoints that replace the old one when they are complete, whatever happens while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qat.runs.writing import replacing


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a new checkpoint beside the old one and then replaces it, so that there is always a complete one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write, flush to the disk, rename; QatError that names the file where it cannot be written."""
        with replacing(Path(path), "wb") as file:
            noting = NotingErrors(file)
            try:
                torch.save(checkpoint, noting)  # type: ignore[arg-type]
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
