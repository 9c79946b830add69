"""The checkpoint from which a killed run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from qat.errors import QatError
from qat.runs.folder import LAST
from qat.runs.metrics import MetricsFile

ROWS = "qat_metrics_rows"


class SaveLast(Checkpoint):
    """Writes ``folder/last.ckpt`` every so many optimizer steps and at the end of every pass.

    It is written when a step is complete: after the step's validation if there is one, otherwise when the next batch
    begins, because Lightning logs the metrics of a step after the last hook of the step.

    Args:
        folder: folder of the run.
        every: optimizer steps between two writes.
    """

    def __init__(self, folder: Path, every: int) -> None:
        if every < 1:
            raise QatError(f"--save_every is {every}: give at least 1 optimizer step")
        self.path, self.every = folder / LAST, every
        self._saved, self._between = 0, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let a run with ``max_steps`` resume like any other: Lightning 2.6 would count its last whole pass twice."""
        if not hasattr(trainer.fit_loop, "_iteration_based_training"):
            raise RuntimeError("this version of lightning counts passes in another way; install lightning<2.7")
        setattr(trainer.fit_loop, "_iteration_based_training", lambda: False)  # noqa: B010

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that training starts or resumes with needs no checkpoint."""
        self._saved = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save between two batches."""
        self._between = True
        self._save_if_due(trainer)
        self._between = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation in the middle of a pass, so that a resumed run does not repeat it."""
        gradients_pending = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches
        if not trainer.is_last_batch and not gradients_pending:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save at the end of a pass."""
        self._save(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if trainer.global_step // self.every > self._saved // self.every:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # the metrics up to the checkpoint must not be lost with the process
        trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the length of the metrics file; do not count the batch that is fetched but not yet trained on."""
        checkpoint[ROWS] = sum(logger.rows for logger in _metrics_files(trainer))
        if self._between:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] -= 1

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop the metrics that were logged after the checkpoint: the resumed run logs them again."""
        for logger in _metrics_files(trainer):
            logger.keep(checkpoint.get(ROWS, 0))


def _metrics_files(trainer: L.Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
