"""Training metrics for people who watch a run, without making the host wait for the device between two logs."""

from __future__ import annotations

import lightning as L

SHOWN = ("train/loss", "lr", "step_lr")


class LastLogged:
    """Loss and learning rates of the last step that Lightning logged, as Python numbers.

    Lightning keeps the metrics as tensors on the device. They are fetched once, at the end of the step that logged
    them, when the logger fetches them too.
    """

    def __init__(self) -> None:
        self._step = 0
        self._values: dict[str, float] = {}

    def read(self, trainer: L.Trainer) -> dict[str, float]:
        """The values by name; call it at the end of every batch."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step // every * every if every else 0
        if step != self._step:
            self._step, metrics = step, trainer.callback_metrics
            self._values = {name: float(metrics[name]) for name in SHOWN if name in metrics}
        return self._values
