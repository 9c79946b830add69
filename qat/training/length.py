"""The length of a run in optimizer steps."""

from __future__ import annotations

from math import ceil

import lightning as L


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run: those that are done, and those that its options still plan.

    Passes over the images can differ in their number of batches, and a run that resumes after a finished pass may go on
    with other batches than before. ``max_steps`` is a length; a limit on the time is none.
    """
    per_pass = getattr(trainer.datamodule, "batches_per_pass", None)  # type: ignore[attr-defined]
    if per_pass is None:
        return int(trainer.estimated_stepping_batches)
    if trainer.max_epochs == -1:  # only max_steps ends the run
        return int(trainer.max_steps)
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    batches: list[int] = per_pass(trainer.world_size, trainer.max_epochs)
    batches = [min(n, limit) if isinstance(limit, int) else int(n * limit) for n in batches]
    passes = trainer.fit_loop.epoch_progress.state_dict()["current"]
    left = sum(ceil(n / accumulate) for n in batches[int(passes["processed"]) :])
    if passes["ready"] > passes["processed"]:  # in the middle of a pass
        left -= trainer.fit_loop.epoch_loop.batch_progress.current.completed // accumulate
    steps = trainer.global_step + left
    return min(steps, int(trainer.max_steps)) if trainer.max_steps > 0 else steps
