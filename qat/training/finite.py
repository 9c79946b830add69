"""A check for losses that are not finite, without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import QatError


class FiniteCheck:
    """Raises for a loss that is not finite: at once on a CPU, one step late on a GPU.

    A look at a value on a GPU waits for everything before it, so there the flag travels while the next step is
    prepared. A checkpoint is safe all the same: `QATModule` refuses to save weights that are not finite.
    """

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, Tensor, torch.cuda.Event, str] | None = None

    def check(self, loss: Tensor, place: str) -> None:
        """QatError that names ``place`` when its ``loss`` is not finite."""
        loss = loss.detach()
        if not loss.is_cuda:
            return _raise_unless(bool(torch.isfinite(loss)), loss, place)
        flag = torch.isfinite(loss).to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, self._waiting = self._waiting, (flag, loss, event, place)
        if before is not None:
            before[2].synchronize()
            _raise_unless(bool(before[0]), before[1], before[3])
        return None


def _raise_unless(finite: bool, loss: Tensor, place: str) -> None:
    if not finite:
        raise QatError(
            f"the loss is {loss.item()} at {place}; the last good checkpoint is kept: lower model.lr, "
            "set trainer.gradient_clip_val, or use bf16-mixed, not 16-mixed"
        )
