"""The checkpoint from which a run resumes that was stopped, killed, or is to be made longer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from qat.callbacks.agreement import Agreement
from qat.callbacks.counters import (
    batches_of,
    begin_a_validation,
    count_before_a_validation,
    count_between_batches,
    count_in_the_middle_of_a_pass,
    count_steps,
)
from qat.callbacks.time_limit import TimeLimit
from qat.checkpoint import DATA
from qat.ranges import Range, checked
from qat.runs import stop
from qat.runs.folder import LAST
from qat.runs.metrics import MetricsFile

ROWS = "qat_metrics_rows"
TIME_IS_OVER = 1  # beside the numbers of signals


class SaveLast(Checkpoint):
    """Writes ``folder/last.ckpt`` every so many optimizer steps, at the end of every pass, and before a run stops.

    It is written when a step is complete: after the step's validation if there is one, otherwise when the next batch
    begins, because Lightning logs the metrics of a step after the last hook of the step. There, and between two batches
    of a validation, all processes look whether one of them was told to stop, or the time is over.

    Args:
        folder: folder of the run.
        every: optimizer steps between two writes.
    """

    @checked
    def __init__(self, folder: Path, every: Annotated[int, Range(1)]) -> None:
        self.path, self.every = folder / LAST, every
        self._saved, self._boundaries = 0, 0
        self._between_batches = self._validating = self._pass_is_over = False
        self._agreement = Agreement()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let a run with ``max_steps`` resume like any other: Lightning 2.6 would count its last whole pass twice."""
        if not hasattr(trainer.fit_loop, "_iteration_based_training"):
            raise RuntimeError("this version of lightning counts passes in another way; install lightning<2.7")
        setattr(trainer.fit_loop, "_iteration_based_training", lambda: False)  # noqa: B010

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal is only noted, until the first batch begins."""
        stop.defer()
        self._agreement.connect(trainer.global_rank, trainer.world_size)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that training starts or resumes with needs no checkpoint."""
        self._saved = trainer.global_step
        self._pass_is_over = trainer.fit_loop.done  # only the validation of the last step is left

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimizer steps, and stop there if the run has to."""
        self._pass_is_over = False
        if batch_idx % trainer.accumulate_grad_batches:
            return
        # Lightning counts one step more after a checkpoint from between two passes; loggers number their entries by it.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._between_batches = True
        if reason := self._agreement.ask(self._wanted(trainer)):
            self._save(trainer)
            raise _stopped(trainer, reason)
        self._save_if_due(trainer)
        self._between_batches = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches between which this validation can stop: those that every process has."""
        if trainer.state.fn == TrainerFn.FITTING:
            begin_a_validation(trainer)
            self._boundaries = self._agreement.common(sum(int(n) for n in trainer.num_val_batches))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop in the middle of a validation, if the run has to: a resumed run starts with the validation."""
        if trainer.state.fn != TrainerFn.FITTING or batch_idx >= self._boundaries:
            return
        if not (reason := self._agreement.ask(self._wanted(trainer))):
            return
        if not self._pass_is_over:  # else it was saved at the end of the pass
            _take_averages_out(trainer, pl_module)
            self._validating = True
            self._save(trainer)
        raise _stopped(trainer, reason)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation in the middle of a pass, or at the end of training, so that it is not repeated."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        gradients_pending = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches
        if self._pass_is_over:
            self._save(trainer)
        elif not trainer.is_last_batch and not gradients_pending:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save at the end of a pass, or where training ends in the middle of one."""
        self._pass_is_over = True
        self._save(trainer)

    def _wanted(self, trainer: L.Trainer) -> int:
        """What this process wants: to stop because of a signal, of the time, or 0 for neither."""
        limits = [callback for callback in trainer.callbacks if isinstance(callback, TimeLimit)]  # type: ignore[attr-defined]
        return stop.told() or (TIME_IS_OVER if any(limit.is_over() for limit in limits) else 0)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if trainer.global_step // self.every > self._saved // self.every:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # the metrics up to the checkpoint must not be lost with the process
        trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the length of the metrics file; count passes and batches as a resumed run has to find them."""
        checkpoint[ROWS] = sum(logger.rows for logger in _metrics_files(trainer))
        if self._between_batches:
            count_between_batches(checkpoint)
        if self._validating:
            count_before_a_validation(checkpoint)
        if self._pass_is_over:
            count_steps(checkpoint, trainer.global_step)
        if self._pass_is_over and not trainer.is_last_batch:
            count_in_the_middle_of_a_pass(checkpoint, trainer.accumulate_grad_batches)
            checkpoint[DATA] |= {"batches": batches_of(checkpoint), "finished": False}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop the metrics that were logged after the checkpoint: the resumed run logs them again.

        Of the checkpoints that were selected, Lightning restores too little: not the score of the last one, and nothing
        at all where the folder of the run has been moved.
        """
        for logger in _metrics_files(trainer):
            logger.keep(checkpoint.get(ROWS, 0))
        in_place = Path(str(trainer.ckpt_path)).resolve() == self.path.resolve()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state:
                callback.current_score = state.get("current_score")
                if in_place:
                    checkpoint["callbacks"][callback.state_key] = _moved(state, str(callback.dirpath))


def _metrics_files(trainer: L.Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def _stopped(trainer: L.Trainer, reason: int) -> stop.Stopped:
    signum = 0 if reason == TIME_IS_OVER else reason
    runs = Path(trainer.default_root_dir).parent.parent
    elsewhere = f" --runs {runs}" if runs != Path("runs") else ""
    return stop.Stopped(signum, f"at step {trainer.global_step}; go on with --ckpt last{elsewhere}", saved=True)


def _take_averages_out(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Give the module its own weights back, which averages have replaced for the validation that ends here."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_validation_epoch_end(trainer, module)


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """The state of a `ModelCheckpoint` whose folder has another name than when the state was saved."""
    before = str(state.get("dirpath"))

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {move(key): move(item) for key, item in value.items()}
        return folder + value.removeprefix(before) if isinstance(value, str) and value.startswith(before) else value

    return dict(move(state))
