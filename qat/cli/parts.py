"""What a training run has beside the trainer's options: loggers, checkpoints, tables; a process for each device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from qat.callbacks import FinalValidation, GradientRatio, RecordSites, SaveLast
from qat.cli.summary import Best
from qat.errors import QatError
from qat.runs.metrics import MetricsFile
from qat.runs.process import first_process
from qat.training.metrics import BY_LABEL, BY_TEACHER


def recorders(run: Path, config: Any, callbacks: Sequence[Callback]) -> list[Callback]:
    """What a run saves: its table, the best checkpoint, and the last one.

    The best one is chosen by held-out training images where there are some, else by validation images.

    Args:
        run: folder of the run.
        config: the options of the run.
        callbacks: those that the user has given.
    """
    best = partial(
        ModelCheckpoint, run, save_top_k=1, auto_insert_metric_name=False, enable_version_counter=False,
        save_on_train_epoch_end=False,  # but when a validation ends, also the final one
    )  # fmt: skip
    found: list[Callback] = [RecordSites(run)]
    if config.model.regularizers and not any(isinstance(callback, GradientRatio) for callback in callbacks):
        found.append(GradientRatio())
    if config.data.held_out:
        metric = BY_TEACHER if config.model.teacher else BY_LABEL
        found.append(best(filename="best_on_held_out_{epoch}", monitor=metric, mode="min"))
    else:
        found.append(best(filename="best_on_val_{epoch}", monitor="val/top1", mode="max"))
    return [*found, SaveLast(run, config.save_every), FinalValidation()]


def all_loggers(run: Path, given: Any) -> list[Logger]:
    """metrics.csv in the folder of the run, and beside it the loggers that the user has given, if any.

    Ours is the first: Lightning takes the folder of the first logger for that of the run.
    """
    if given in (None, True, False):
        return [MetricsFile(run)]
    return [MetricsFile(run), *(given if isinstance(given, list) else [given])]


def as_list(given: Any) -> list[Any]:
    """Callbacks or plugins of the trainer, of which a single one needs no list.

    `check_trainer` knows the metrics that a callback may monitor; a run may end before its first validation, and that
    is no reason for `EarlyStopping` to fail.
    """
    found = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    for callback in found:
        if isinstance(callback, EarlyStopping):
            callback.strict = False
    return found


def best_of(trainer: L.Trainer) -> Best | None:
    """The best checkpoint, where there is one."""
    best = trainer.checkpoint_callback
    if not isinstance(best, ModelCheckpoint) or best.best_model_score is None:
        return None
    file = Path(trainer.default_root_dir) / Path(best.best_model_path).name
    return Best(file, str(best.monitor), float(best.best_model_score))


def check_processes(trainer: L.Trainer) -> None:
    """Raise QatError where a launcher has started more processes than the trainer knows of: each would train alone."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if torch.distributed.is_torchelastic_launched() else 1
    if started > 1 and started != trainer.world_size:
        raise QatError(
            f"torchrun has started {started} processes, but trainer.devices x trainer.num_nodes is "
            f"{trainer.world_size}: give --trainer.devices the processes of each machine"
        )
    if trainer.world_size == 1 and not first_process():
        raise QatError("this is one of several processes, but trainer.devices is 1: give their number on each machine")
