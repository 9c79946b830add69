"""Predictions as a CSV table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from qat.errors import QatError
from qat.training.module import Prediction, QATModule


class WritePredictions(L.Callback):
    """Writes one line per image: path, then class and probability of the five most probable classes.

    The file gets its name when it is complete; an interrupted run leaves only ``NAME.part``.

    Args:
        path: CSV file to write.
        classes: class names in label order; a class is written as its number when empty.
    """

    def __init__(self, path: Path, classes: Sequence[str] = ()) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.classes = classes

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the header."""
        if trainer.world_size > 1:
            raise QatError("qat predict writes one table: run it with --trainer.devices 1")
        assert isinstance(pl_module, QATModule)
        top = min(5, pl_module.card.num_classes)
        columns = [f"{name}_{k}" for k in range(1, top + 1) for name in ("class", "prob")]
        self._write("w", [["path", *columns]])

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Append the lines of a batch."""
        assert isinstance(outputs, Prediction)
        rows = []
        for path, classes, probs in zip(outputs.paths, outputs.classes.tolist(), outputs.probs.tolist(), strict=True):
            named = [self.classes[c] if self.classes else c for c in classes]
            rows.append([path, *(cell for name, p in zip(named, probs, strict=True) for cell in (name, f"{p:.6f}"))])
        self._write("a", rows)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the complete file its name."""
        self.part.replace(self.path)

    def _write(self, mode: str, rows: list[list[Any]]) -> None:
        with self.part.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
