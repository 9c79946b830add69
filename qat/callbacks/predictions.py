"""Predictions as a CSV table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import lightning as L

from qat.data.folder import descriptions, wnids
from qat.errors import QatError
from qat.runs.writing import replacing, writing
from qat.training.module import QATModule
from qat.training.records import Prediction


class WritePredictions(L.Callback):
    """Writes one line per image: path, then class and probability of the five most probable classes.

    ImageNet's classes are named beside their wnids. The file appears when it is complete; what stood there before is
    kept until then. A path is written as the bytes that the system has, whether or not they are UTF-8.

    Args:
        path: CSV file to write.
        classes: class names in label order; a class is written as its number when empty.
    """

    def __init__(self, path: Path, classes: Sequence[str] = ()) -> None:
        self.path, self.classes = path, classes
        self.words = descriptions() if classes and set(classes) <= set(wnids()) else {}
        self.images = 0  # written so far
        self._file: IO[str]
        self._open = ExitStack()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the header."""
        if trainer.world_size > 1:
            raise QatError("qat predict writes one table: run it with --trainer.devices 1")
        assert isinstance(pl_module, QATModule)
        self._file = self._open.enter_context(replacing(self.path, errors="surrogateescape"))
        top = min(5, pl_module.card.num_classes)
        kinds = ("class", "name", "prob") if self.words else ("class", "prob")
        self._write([["path", *(f"{kind}_{k}" for k in range(1, top + 1) for kind in kinds)]])

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Append the lines of a batch."""
        assert isinstance(outputs, Prediction)
        rows = []
        for path, classes, probs in zip(outputs.paths, outputs.classes.tolist(), outputs.probs.tolist(), strict=True):
            cells = [cell for c, prob in zip(classes, probs, strict=True) for cell in self._cells(c, prob)]
            rows.append([path, *cells])
        self._write(rows)
        self.images += len(rows)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the complete file its name; QatError when no image could be read."""
        if not self.images:
            raise QatError("no image could be read, so there is nothing to predict")
        self._open.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the incomplete file."""
        self._open.__exit__(QatError, QatError("incomplete"), None)  # an OSError would be taken for one of this file

    def _cells(self, label: int, prob: float) -> list[Any]:
        name = self.classes[label] if self.classes else label
        return [name, self.words[str(name)], f"{prob:.6f}"] if self.words else [name, f"{prob:.6f}"]

    def _write(self, rows: list[list[Any]]) -> None:
        with writing(self.path):
            csv.writer(self._file).writerows(rows)
            self._file.flush()  # a full disk shows here
