"""The progress bar of a terminal."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from qat.callbacks.last_logged import LastLogged


class ProgressBar(RichProgressBar):
    """Lightning's bar, with loss and learning rates of the last logged step: a refresh fetches nothing."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".4g"))  # a learning rate is not 0.000
        self._last = LastLogged()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """What stands behind the bar: these numbers, and those of the last validation."""
        return {**super().get_metrics(trainer, pl_module), **self._last.read(trainer)}
