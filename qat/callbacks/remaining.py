"""How long a training run will still take."""

from __future__ import annotations

import time
from datetime import timedelta

import lightning as L
from lightning.pytorch.callbacks import Timer

from qat.training.module import QATModule


class RemainingTime:
    """Estimates the time to the end of the whole run from the steps that this process has trained so far."""

    def __init__(self) -> None:
        self._started, self._first_step = 0.0, 0

    def start(self, trainer: L.Trainer) -> None:
        """Training starts, or resumes, now."""
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def read(self, trainer: L.Trainer) -> str:
        """Hours, minutes and seconds, such as 1:02:03; ``?`` before the first step.

        A run with ``max_time`` ends at the latest when that is over.
        """
        module, done = trainer.lightning_module, trainer.global_step - self._first_step
        assert isinstance(module, QATModule)
        if not done:
            return "?"
        seconds = (time.monotonic() - self._started) / done * max(module.total - trainer.global_step, 0)
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        limits = [left for timer in timers if (left := timer.time_remaining()) is not None]
        return str(timedelta(seconds=round(max(min([seconds, *limits]), 0))))
