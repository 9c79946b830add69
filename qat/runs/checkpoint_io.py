"""Checkpoints that replace the old one when they are complete, whatever happens while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qat.runs.torch_file import save_replacing


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a new checkpoint beside the old one and then replaces it, so that there is always a complete one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write, flush to the disk, rename; QatError that names the file where it cannot be written."""
        save_replacing(checkpoint, Path(path))
