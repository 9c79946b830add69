"""The length of a run in optimizer steps."""

from __future__ import annotations

from math import ceil

import lightning as L


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run; passes over the images can differ in their number of batches."""
    per_pass = getattr(trainer.datamodule, "batches_per_pass", None)  # type: ignore[attr-defined]
    if per_pass is None:
        return int(trainer.estimated_stepping_batches)
    if trainer.max_epochs == -1:  # only max_steps ends the run
        return int(trainer.max_steps)
    limit = trainer.limit_train_batches
    batches: list[int] = per_pass(trainer.world_size, trainer.max_epochs)
    batches = [min(n, limit) if isinstance(limit, int) else int(n * limit) for n in batches]
    steps = sum(ceil(n / trainer.accumulate_grad_batches) for n in batches)
    return min(steps, int(trainer.max_steps)) if trainer.max_steps > 0 else steps
