"""A weight average that never makes the host wait for the device."""

from __future__ import annotations

from typing import Annotated

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from qat.ranges import Range, checked


class WeightAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, with the same values and checkpoints, but without its waits on a GPU.

    Lightning counts the updates on the device and reads the counter twice in every step; it also launches four kernels
    for each parameter. Like Lightning's, the average is made on the device where `PlaceModule` has put the module.

    Args:
        decay: factor on the average in every update; the weights get the rest.
        update_every_n_steps: optimizer steps between two updates.
        update_starting_at_step: first optimizer step, counted from 0, that is averaged; the first one when null.
    """

    @checked
    def __init__(
        self,
        decay: Annotated[float, Range(0, 1)] = 0.999,
        update_every_n_steps: Annotated[int, Range(1, 1_000_000_000)] = 1,
        update_starting_at_step: Annotated[int, Range(0, 1_000_000_000)] | None = None,
    ) -> None:
        super().__init__(
            decay=decay, update_every_n_steps=update_every_n_steps, update_starting_at_step=update_starting_at_step
        )
        self.decay = decay

    @property
    def state_key(self) -> str:
        """The key of Lightning's callback, so that either one resumes from a checkpoint of the other."""
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the module before training."""
        if stage == "fit":
            self._average_model = Average(pl_module, self.decay)


class Average(AveragedModel):
    """A copy of a module, on its device, that follows its parameters and buffers; the counter is on the CPU."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * model; the first time, average <- model."""
        average = [*self.module.parameters(), *self.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        if self.n_averaged == 0:
            torch._foreach_copy_(average, current)
        else:
            torch._foreach_mul_(average, self.decay)
            torch._foreach_add_(average, torch._foreach_mul(current, 1 - self.decay))
        self.n_averaged += 1
