"""Checkpoints as the trainer reads and writes them: those of Lightning, and packed ones, which it can only read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat import checkpoint
from qat.checkpoint.packed import is_packed
from qat.runs.checkpoint_io import AtomicCheckpoints


class CheckpointFiles(AtomicCheckpoints):
    """Reads a packed checkpoint as the one that it was made from.

    Args:
        trust: quantizers that a card names by a dotted path may be imported.
    """

    def __init__(self, trust: bool) -> None:
        self.trust = trust

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """The content of a file of either kind."""
        if is_packed(Path(path)):
            return checkpoint.read(path, trust=self.trust)[1]
        found: dict[str, Any] = super().load_checkpoint(path, *args, **options)
        return found
