"""A validation at the end of training, where the last step was not validated."""

from __future__ import annotations

from typing import Any

import lightning as L

from qat.callbacks.counters import count_the_pass_as_over, left_in_a_validation


class FinalValidation(L.Callback):
    """Validates when training ends at a step that no validation has seen.

    Training ends between two validations when ``max_steps`` ends it in the middle of a pass, or when
    ``check_val_every_n_epoch`` does not divide the number of passes. A run that is stopped, also by ``max_time``, has
    not ended: it is resumed, and ends with the numbers of a run that was not stopped, also where it was stopped or
    killed in the validation of its last step. The callback has to come before a weight average, which replaces the
    weights by the average when training ends.
    """

    def __init__(self) -> None:
        self._validated: int | None = None  # not known of a checkpoint that an older version has written
        self._trained = False
        self._max_steps: int | None = None  # while training may begin again at its last step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start and end training also where every step is done, and Lightning would not even call the hooks."""
        if stage != "fit":
            return
        train = trainer.fit_loop.run

        def train_and_validate() -> None:
            self._trained = False
            self._let_validation_go_on(trainer)
            train()
            if not self._trained and self._is_due(trainer):
                count_the_pass_as_over(trainer)
                trainer.fit_loop.on_run_start()
                trainer.fit_loop.on_run_end()

        trainer.fit_loop.run = train_and_validate  # type: ignore[method-assign]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the loop its own method back."""
        vars(trainer.fit_loop).pop("run", None)

    def state_dict(self) -> dict[str, Any]:
        """The last step that was validated."""
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume."""
        self._validated = state_dict["validated"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training begins; a step of which a checkpoint does not say whether it was validated is not validated."""
        self._trained = True
        if self._validated is None:
            self._validated = trainer.global_step
        fetcher = trainer.fit_loop._data_fetcher
        if fetcher is None or not trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            self._restore_max_steps(trainer)  # other options: the step is not validated inside its pass any more

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training ends after this validation, if it was resumed for it."""
        self._restore_max_steps(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the step."""
        self._validated = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate inside the training run, as Lightning does it, so that loggers and checkpoints see the metrics."""
        if not self._is_due(trainer):
            return
        loop = trainer.fit_loop.epoch_loop
        trainer.validating = True
        loop._batches_that_stepped -= 1  # loggers count the steps from 0
        loop.val_loop.run()
        loop._batches_that_stepped += 1
        trainer.training = True

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self._validated not in (None, trainer.global_step) and trainer.enable_validation

    def _let_validation_go_on(self, trainer: L.Trainer) -> None:
        """A run was stopped inside its last pass, in the validation of the last step: Lightning would not begin it."""
        loop = trainer.fit_loop.epoch_loop
        if trainer.enable_validation and left_in_a_validation(trainer) and trainer.global_step == loop.max_steps:
            self._max_steps = loop.max_steps
            loop.max_steps += 1

    def _restore_max_steps(self, trainer: L.Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
