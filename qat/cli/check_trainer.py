"""Settings of Lightning's Trainer that qat does not support, or that make no sense: refused before any work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Annotated, Any, Literal

from qat.errors import QatError
from qat.ranges import Range, check_value

PRECISIONS = (None, 32, "32", "32-true", 16, "16", "16-mixed", "bf16", "bf16-mixed")
AVERAGES = {"WeightAverage", "WeightAveraging", "EMAWeightAveraging"}
SHARDING = ("fsdp", "deepspeed", "modelparallel", "xla")  # beginnings of names of strategies
Count = Annotated[int, Range(1)]
Batches = Count | Annotated[float, Range(above=0, high=1)]
BatchesOrNone = Annotated[int, Range(0)] | Annotated[float, Range(0, 1)]
RANGES: dict[str, Any] = {  # Lightning checks some of these late, some not at all
    "accumulate_grad_batches": Count,
    "check_val_every_n_epoch": Count | None,
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "gradient_clip_val": Annotated[float, Range(0)] | None,
    "limit_predict_batches": Batches | None,
    "limit_train_batches": Batches | None,
    "limit_val_batches": BatchesOrNone | None,
    "log_every_n_steps": Annotated[int, Range(0)] | None,
    "max_epochs": Annotated[int, Range(-1, 1_000_000)] | None,
    "max_steps": Annotated[int, Range(-1)],
    "min_epochs": Annotated[int, Range(0)] | None,
    "min_steps": Annotated[int, Range(0)] | None,
    "num_nodes": Count,
    "precision": Literal["32-true", "bf16-mixed", "16-mixed", "32", "16", "bf16", 32, 16] | None,
    "num_sanity_val_steps": Annotated[int, Range(-1)] | None,
    "overfit_batches": BatchesOrNone,
}
FIXED = {  # options that have one value here, and why
    "barebones": (False, "a run without checkpoints and metrics cannot be resumed"),
    "reload_dataloaders_every_n_epochs": (1, "each pass has a loader of its own"),
    "use_distributed_sampler": (False, "the images are spread over the processes already"),
    "overfit_batches": (0, "give --trainer.limit_train_batches instead"),
}
CALLBACKS = {  # callbacks that are refused, and why
    "BatchSizeFinder": "the size of a batch decides which images are in it: give --data.batch_size",
    "GradientAccumulationScheduler": "the schedule of the learning rate would be planned for another number of steps: "
    "give --trainer.accumulate_grad_batches",
    "LearningRateFinder": "it would look for the learning rate of one group of parameters, and steps have their own: "
    "give --model.lr and --model.step_lr",
    "StochasticWeightAveraging": "it replaces the schedule of the learning rate and cannot be resumed: take "
    "WeightAverage or EMAWeightAveraging",
}
METRICS = ("val/top1", "val/top5", "val/loss", "val/images", "train/loss", "train/kl", "train/label_entropy", "lr",
           "step_lr")  # fmt: skip


def check_trainer(trainer: Any, verb: str = "fit", metrics: Sequence[str] = ()) -> None:
    """Check the options under ``trainer``.

    Args:
        trainer: the options as they are parsed; callbacks are not built yet.
        verb: fit, validate, calibrate or predict.
        metrics: what a callback may monitor beside `METRICS`: `further_metrics`.

    Raises:
        QatError: a value out of its range; a precision that keeps parameters in less, or more, than float32; a
            strategy that shards them; a callback that cannot be used; a run without an end.
    """
    _check_precision(trainer.precision)
    for name, hint in RANGES.items():
        if hasattr(trainer, name):
            check_value(f"trainer.{name}", getattr(trainer, name), hint)
    for name, (value, reason) in FIXED.items():
        if (given := getattr(trainer, name, value)) != value:
            raise QatError(f"trainer.{name} is {given}: {reason}, so leave it out")
    _check_nodes(getattr(trainer, "num_nodes", 1))
    _check_time(getattr(trainer, "val_check_interval", None))
    _check_length(trainer, verb)
    _check_strategy(trainer.strategy)
    _check_callbacks(getattr(trainer, "callbacks", None) or [], (*METRICS, *metrics))


def check_run(trainer: Any, datamodule: Any, verb: str) -> None:
    """Compare limits and intervals of a trainer that is built with the number of batches; see `check_lengths`."""
    option = "limit_predict_batches" if verb == "predict" else "limit_val_batches"
    limit = getattr(trainer, option)
    if verb == "fit":
        passes = 1 if trainer.max_epochs == -1 else trainer.max_epochs
        check_lengths(trainer, datamodule.batches_per_pass(trainer.world_size, passes))
        check_held_out(limit, datamodule.options.held_out, datamodule.val_batch_size, trainer.world_size)
    images = datamodule.predict_dataloader if verb == "predict" else datamodule.val_dataloader
    if not isinstance(limit, float) or not 0 < limit < 1:
        return  # a calibration that is not evaluated has no validation images to count
    batches = ceil(len(images()) / trainer.world_size)
    if int(batches * limit) == 0:
        raise QatError(f"trainer.{option} is {limit}: of {batches} batches none is left")


def check_held_out(limit: float | None, images: int, batch_size: int, processes: int) -> None:
    """Raise QatError where a process would have no held-out image, or a limit would leave some of them out."""
    if not images:
        return
    if images < processes:
        raise QatError(
            f"data.held_out is {images}, and there are {processes} processes: hold out one for each, at least"
        )
    batches = ceil(ceil(images / processes) / batch_size)
    left = batches if limit is None else limit if isinstance(limit, int) else int(batches * limit)
    if left < batches:
        raise QatError(
            f"trainer.limit_val_batches is {limit}, and data.held_out has {batches} batches, by all of which the best "
            "checkpoint is chosen: leave one of the two options out"
        )


def check_lengths(trainer: Any, batches: list[int]) -> None:
    """Compare intervals with the number of training batches of each pass, of one process.

    Raises:
        QatError: an interval is longer than a pass, or a limit leaves no batch.
    """
    shortest, limit, every = min(batches, default=0), trainer.limit_train_batches, trainer.val_check_interval
    if isinstance(limit, float) and shortest and int(shortest * limit) == 0:
        raise QatError(f"trainer.limit_train_batches is {limit}: of {shortest} batches of a pass none is left")
    shortest = min(shortest, limit) if isinstance(limit, int) else int(shortest * limit)
    by_pass = trainer.check_val_every_n_epoch is not None
    if by_pass and isinstance(every, int) and not isinstance(every, bool) and every > shortest:
        raise QatError(
            f"trainer.val_check_interval is {every}, and a pass over the images has {shortest} batches: give fewer, or "
            "count over all passes with --trainer.check_val_every_n_epoch null"
        )


def _check_nodes(count: int) -> None:
    """Several machines need somebody who says where the first one is: else each waits for the others."""
    if count > 1 and not {"MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID"} & set(os.environ):
        raise QatError(
            f"trainer.num_nodes is {count}: start the command on each machine by torchrun or SLURM, or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK there"
        )


def _check_time(interval: Any) -> None:
    if isinstance(interval, int | float):
        check_value("trainer.val_check_interval", interval, Batches)


def _check_length(trainer: Any, verb: str) -> None:
    """A run must end, and its length be known before: the learning rate follows a cosine over all of it."""
    if verb == "fit" and getattr(trainer, "max_epochs", None) == -1 and trainer.max_steps == -1:
        raise QatError(
            "trainer.max_epochs is -1 and trainer.max_steps is not set: the schedule of the learning rate needs the "
            "length of the run, also with trainer.max_time; give --trainer.max_steps, or the passes"
        )
    for name in ("max_steps", "max_epochs"):
        if verb == "fit" and getattr(trainer, name, None) == 0:
            raise QatError(f"trainer.{name} is 0: nothing would be trained; to calibrate alone, run `qat calibrate`")
    if verb in ("validate", "calibrate") and getattr(trainer, "limit_val_batches", None) == 0:
        instead = " and say --validate false" if verb == "calibrate" else ""
        raise QatError(f"trainer.limit_val_batches is 0: no image would be evaluated, so leave it out{instead}")


def _check_precision(precision: Any) -> None:
    if precision not in PRECISIONS:
        raise QatError(
            f"trainer.precision is {precision}: steps of quantizers are float32 parameters, so choose 32-true, "
            "bf16-mixed or 16-mixed"
        )


def _check_strategy(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", type(strategy).__name__))
    bare = name.rpartition(".")[2].lower().replace("_", "")
    if bare.startswith(SHARDING):
        raise QatError(
            f"trainer.strategy is {name}: it cuts parameters into shards, and a quantizer needs its whole weight; "
            "choose auto or ddp"
        )


def _check_callbacks(callbacks: Any, metrics: tuple[str, ...]) -> None:
    """Refuse callbacks that cannot be used, and those of ours or Lightning's that monitor what nobody logs."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(getattr(callback, "class_path", type(callback).__name__)) for callback in listed]
    for path in paths:
        if (reason := CALLBACKS.get(path.rpartition(".")[2])) is not None:
            raise QatError(f"trainer.callbacks: {path.rpartition('.')[2]} cannot be used: {reason}")
    names = {path.rpartition(".")[2] for path in paths}
    if "IterativeFreezing" in names and names & AVERAGES:
        raise QatError("IterativeFreezing and a weight average do not go together: leave one of trainer.callbacks out")
    if not all(path.startswith(("lightning.", "qat.")) for path in paths):
        return  # another one may log a metric of its own
    for path, callback in zip(paths, listed, strict=True):
        monitor = (getattr(callback, "init_args", None) or {}).get("monitor")
        known = (*metrics, "epoch", "step") if path.endswith("ModelCheckpoint") else metrics
        if monitor is not None and monitor not in known:
            raise QatError(
                f"trainer.callbacks: {path.rpartition('.')[2]} monitors {monitor!r}, which is not logged: choose from "
                f"{', '.join(known)}"
            )


def further_metrics(model: Any, held_out: int) -> Iterator[str]:
    """What is logged beside `METRICS`: losses of regularizers, as `Regularizer.name` makes them, and of features.

    Args:
        model: the options under ``model``.
        held_out: option ``data.held_out``.
    """
    for regularizer in getattr(model, "regularizers", None) or []:
        path = regularizer.get("class_path", "") if isinstance(regularizer, Mapping) else regularizer.class_path
        yield "train/" + re.sub(r"(?<!^)(?=[A-Z])", "_", str(path).rpartition(".")[2]).lower()
    if getattr(model, "features", None):
        yield "train/features"
    if held_out:
        yield from ("held_out/kl", "held_out/agreement") if model.teacher else ("held_out/loss", "held_out/top1")
