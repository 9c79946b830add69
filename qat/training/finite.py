"""Checks for numbers that are not finite: losses, without making the host wait for the device, and weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qat.errors import QatError


class Copy(NamedTuple):
    """A loss on its way from the GPU to the host."""

    loss: Tensor  # on the host; its value is there once the event has happened
    event: torch.cuda.Event
    place: str


class FiniteCheck:
    """Raises for a loss that is not finite: at once on a CPU, a few steps late on a GPU.

    Reading a value from a GPU would wait for everything that was launched before it. So the losses are copied in the
    background, and each call looks only at the copies that have arrived. A checkpoint is safe all the same:
    `check_weights` refuses to save weights that are not finite.
    """

    def __init__(self) -> None:
        self.copies: deque[Copy] = deque()

    def check(self, loss: Tensor, place: str) -> None:
        """Raise QatError that names the place of the first loss that is known not to be finite."""
        loss = loss.detach()
        if not loss.is_cuda:
            return _raise_unless_finite(loss, place)
        on_host = loss.to("cpu", non_blocking=True)  # in pinned memory
        event = torch.cuda.Event()
        event.record()
        self.copies.append(Copy(on_host, event, place))
        while self.copies and self.copies[0].event.query():
            self._look_at_the_first()
        return None

    def wait(self) -> None:
        """Wait for all copies and look at them: when the host waits anyway, and when training ends."""
        while self.copies:
            self.copies[0].event.synchronize()
            self._look_at_the_first()

    def _look_at_the_first(self) -> None:
        copy = self.copies.popleft()
        _raise_unless_finite(copy.loss, copy.place)


def check_weights(state: Mapping[str, Tensor], step: int) -> None:
    """Raise QatError rather than let a checkpoint of step ``step`` hold weights that are not finite."""
    finite = torch.stack([torch.isfinite(value).all() for value in state.values()]).tolist()  # fetched once
    for name, is_finite in zip(state, finite, strict=True):
        if not is_finite:
            raise QatError(f"{name} is not finite at step {step}; the last good checkpoint is kept")


def _raise_unless_finite(loss: Tensor, place: str) -> None:
    if not torch.isfinite(loss):
        raise QatError(
            f"the loss is {loss.item()} at {place}; the last good checkpoint is kept: lower model.lr, "
            "set trainer.gradient_clip_val, or use bf16-mixed, not 16-mixed"
        )
