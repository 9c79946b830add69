"""Lightning's counters of passes and batches, as a checkpoint must hold them for its run to resume at the right place.

A counter of Lightning has a ``total`` and a ``current`` part, each with numbers that are ready, started, processed and
completed.
"""

from __future__ import annotations

from typing import Any

import lightning as L

Counts = dict[str, Any]
NUMBERS = ("ready", "started", "processed", "completed")


def count_between_batches(checkpoint: dict[str, Any]) -> None:
    """Do not count the batch that is fetched but not yet trained on."""
    for counts in _parts(checkpoint, "epoch_loop.batch_progress"):
        counts["ready"] -= 1


def count_in_the_middle_of_a_pass(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Count a pass that Lightning has ended early, as it does at ``max_steps``, as begun and not as finished.

    Batches whose gradients have not led to an optimizer step are not counted either: a resumed run takes them again.

    Args:
        checkpoint: changed in place.
        accumulate: batches per optimizer step.
    """
    total, current = _parts(checkpoint, "epoch_loop.batch_progress")
    unused = current["completed"] % accumulate
    for counts in (total, current):
        _set(counts, counts["completed"] - unused, counts["completed"] - unused)
    for counts in _parts(checkpoint, "epoch_progress"):
        counts["processed"] = counts["ready"] - 1
        counts["completed"] = min(counts["completed"], counts["processed"])


def count_before_a_validation(checkpoint: dict[str, Any]) -> None:
    """Count no image of the validation that is running: a resumed run starts with the whole of it."""
    for counts in _parts(checkpoint, "epoch_loop.val_loop.batch_progress"):
        _set(counts, begun=1, done=0)  # Lightning knows by this that a validation was left in the middle


def count_steps(checkpoint: dict[str, Any], steps: int) -> None:
    """Count the optimizer steps by which loggers number their entries; in a final validation, Lightning counts less."""
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def begin_a_validation(trainer: L.Trainer) -> None:
    """Forget that an earlier start of the run has left a validation in the middle: it would be repeated again."""
    total = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    total.load_state_dict(dict.fromkeys(NUMBERS, total.completed))


def left_in_a_validation(trainer: L.Trainer) -> bool:
    """Whether a resumed run starts with a validation, by `count_before_a_validation`."""
    total = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.state_dict()
    return bool(total["started"] != total["completed"])


def count_the_pass_as_over(trainer: L.Trainer) -> None:
    """Count a resumed run whose steps are all done as Lightning counts it when training ends: no pass is open."""
    progress = trainer.fit_loop.epoch_progress
    for counts in (progress.total, progress.current):
        counts.load_state_dict(dict.fromkeys(NUMBERS, counts.ready))


def batches_of(checkpoint: dict[str, Any]) -> int:
    """Batches of the present pass that a checkpoint counts as finished."""
    done: int = _parts(checkpoint, "epoch_loop.batch_progress")[1]["processed"]
    return done


def _parts(checkpoint: dict[str, Any], name: str) -> tuple[Counts, Counts]:
    counter = checkpoint["loops"]["fit_loop"][name]
    return counter["total"], counter["current"]


def _set(counts: Counts, begun: int, done: int) -> None:
    counts["ready"] = counts["started"] = begun
    counts["processed"] = counts["completed"] = done
