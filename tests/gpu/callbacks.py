"""Callbacks that the GPU tests name in a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class DeviceRecorder(L.Callback):
    """After every training batch, notes the kind of device on which each tensor of the run lies, and what is pinned."""

    def __init__(self) -> None:
        self.devices: dict[str, set[str]] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the module, its weight average, the optimizer and the batch."""
        for name, tensor in self._tensors(trainer, pl_module, batch):
            self.devices.setdefault(name, set()).add(tensor.device.type)

    def _tensors(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> Iterator[tuple[str, Tensor]]:
        yield from (("model", tensor) for tensor in _all_of(module))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                yield from (("average", tensor) for tensor in _all_of(callback._average_model))
        for state in trainer.optimizers[0].state.values():
            yield from (("step" if name == "step" else "optimizer", value) for name, value in state.items())
        yield from (("batch", tensor) for tensor in (batch.images, batch.labels))


def _all_of(module: Any) -> list[Tensor]:
    return [*torch.nn.Module.parameters(module), *torch.nn.Module.buffers(module)]


class NoWaits(L.Callback):
    """Makes it an error that the host waits for the GPU, from the end of one logged step to the start of the next.

    Attributes:
        watched: steps during which a wait was an error.
    """

    def __init__(self) -> None:
        self.watched: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A logged step fetches its metrics after the last hook, so the watch starts with the step after it."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        watched = step >= every and (step + 1) % every != 0
        set_wait_mode("error" if watched else "default")
        self.watched += [step] * watched

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The end of an epoch validates and saves, which waits."""
        set_wait_mode("default")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let the error handling wait."""
        set_wait_mode("default")


def set_wait_mode(mode: str) -> None:
    """``error`` or ``default``; a CPU has nothing to wait for."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)
