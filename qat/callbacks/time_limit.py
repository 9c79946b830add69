"""A limit on the time of training, for a job that may run only so long."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer


class TimeLimit(Timer):
    """``trainer.max_time``: `SaveLast` saves and stops at the first step after it.

    Lightning's own timer ends the pass, so that a resumed run would skip the rest of it, and counts the time of all
    starts of a run together. This one counts from the start of training in this process.

    Args:
        duration: DD:HH:MM:SS, or days, hours, minutes and seconds by name.
    """

    def __init__(self, duration: str | timedelta | dict[str, int]) -> None:
        super().__init__(duration)

    def is_over(self) -> bool:
        """Whether the time is over."""
        left = self.time_remaining()
        return left is not None and left <= 0

    def on_fit_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Nothing has run yet."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Leave the end to `SaveLast`."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the next start has its own time."""
        return {}
