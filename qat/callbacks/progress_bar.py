"""The progress bar of a terminal."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from qat.callbacks.last_logged import LastLogged
from qat.callbacks.remaining import RemainingTime


class ProgressBar(RichProgressBar):
    """Lightning's bar, with the time that the whole run still takes, and loss and learning rates of the last log.

    The bar itself counts the batches of one pass. A refresh fetches nothing from the device.
    """

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".4g"))  # a learning rate is not 0.000
        self._last_logged, self._remaining = LastLogged(), RemainingTime()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._remaining.start(trainer)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """What stands behind the bar: the remaining time, these numbers, and those of the last validation."""
        metrics = {"left": self._remaining.read(trainer), **super().get_metrics(trainer, pl_module)}
        metrics.pop("v_num", None)  # the date of the run, cut to four characters
        return {**metrics, **self._last_logged.read(trainer)}

    def _get_train_description(self, current_epoch: int) -> str:
        """What stands before the bar: this program counts passes over the images from 1."""
        passes = self.trainer.max_epochs
        return f"pass {current_epoch + 1}" + (f" of {passes}" if passes and passes > 0 else "")
