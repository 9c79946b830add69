"""Progress as plain lines, for a log file or a batch system."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from qat.callbacks.last_logged import LastLogged
from qat.callbacks.remaining import RemainingTime
from qat.training.length import total_steps
from qat.training.module import QATModule

log = logging.getLogger(__name__)


class ConsoleLog(L.Callback):
    """Logs a line at most every ``seconds`` seconds of training, and one for every validation."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self._last_line = 0.0
        self._last_logged, self._remaining = LastLogged(), RemainingTime()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where training starts."""
        self._last_line = time.monotonic()
        self._remaining.start(trainer)
        place = (trainer.global_step, total_steps(trainer), trainer.current_epoch + 1)  # the module counts them later
        log.info("training starts at step %d of %d, pass %d", *place)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step, and the loss of the last step whose metrics were logged, at most every ``seconds`` seconds."""
        metrics = self._last_logged.read(trainer)
        if time.monotonic() - self._last_line < self.seconds:
            return
        self._last_line = time.monotonic()
        assert isinstance(pl_module, QATModule)
        step = f"step {trainer.global_step} of {pl_module.total}"
        place = f"pass {trainer.current_epoch + 1}, batch {batch_idx + 1} of {trainer.num_training_batches}"
        log.info("%s (%s), %s left: %s", step, place, self._remaining.read(trainer), _format(metrics, "train/loss"))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from here."""
        self._last_line = time.monotonic()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Say how far a long evaluation is, at most every ``seconds`` seconds."""
        if time.monotonic() - self._last_line >= self.seconds:
            self._last_line = time.monotonic()
            log.info("evaluation: batch %d of %s", batch_idx + 1, trainer.num_val_batches[dataloader_idx])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metrics of a validation during training; `qat validate` prints its own."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        log.info(
            "validation at step %d: %s", trainer.global_step, _format(trainer.callback_metrics, "val/", "held_out/")
        )


def _format(metrics: Mapping[str, Any], *prefixes: str) -> str:
    chosen = {name: float(value) for name, value in metrics.items() if name.startswith(prefixes)}
    return ", ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in chosen.items())
