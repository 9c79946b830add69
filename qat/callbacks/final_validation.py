"""A validation at the end of training, where the last step was not validated."""

from __future__ import annotations

import lightning as L


class FinalValidation(L.Callback):
    """Validates when training ends at a step that no validation has seen.

    Training ends between two validations when ``max_steps`` ends it in the middle of a pass, or when
    ``check_val_every_n_epoch`` does not divide the number of passes. A run that is stopped, also by ``max_time``, has
    not ended: it is resumed, and ends with the numbers of a run that was not stopped. The callback has to come before a
    weight average, which replaces the weights by the average when training ends.
    """

    def __init__(self) -> None:
        self._validated = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that resumes and finds nothing left to train is not validated again."""
        self._validated = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the step."""
        self._validated = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate inside the training run, as Lightning does it, so that loggers and checkpoints see the metrics."""
        if self._validated == trainer.global_step or not trainer.enable_validation:
            return
        loop = trainer.fit_loop.epoch_loop
        trainer.validating = True
        loop._batches_that_stepped -= 1  # loggers count the steps from 0
        loop.val_loop.run()
        loop._batches_that_stepped += 1
        trainer.training = True
