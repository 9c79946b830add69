"""What the reconstruction of one unit reads: its inputs and what the float model makes of them.

Shapes: n images, ... the shape of a tensor for one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.ptq.cache import Batches, Rows
from qat.ptq.output_gradients import after
from qat.ptq.unit_work import UnitWork

PART = 32  # images at once, where no gradient needs them all


class UnitData:
    """Tensors of all images, in their order.

    Args:
        here: the unit, complete but for its reconstruction.
    """

    def __init__(self, here: UnitWork) -> None:
        assert here.float_inputs is not None
        assert here.float_outputs is not None
        self.here = here
        self.inputs = rows_of(here.inputs)  # (n, ...) what the quantized units before it give
        self.float_inputs = rows_of(here.float_inputs)
        self.targets = rows_of(here.float_outputs)  # (n, ...) the output of the float model

    def __len__(self) -> int:
        return len(self.inputs)

    def placed(self, picks: Tensor) -> Tensor:
        """Indices, drawn on the CPU, where the tensors are kept; a GPU gets them without a wait of the host."""
        device = self.inputs.storage.device
        return picks if device.type == "cpu" else picks.pin_memory().to(device, non_blocking=True)

    def parts(self) -> Iterator[slice]:
        """Slices of all images."""
        for start in range(0, len(self), PART):
            yield slice(start, start + PART)

    def rest(self, out: Tensor) -> Tensor:
        """Logits (B, classes) that the units after this one, in floating point, make of its output (B, ...)."""
        return after(self.here, out)

    @cached_property
    @torch.no_grad()
    def logits(self) -> Tensor:
        """Those of the float model (n, classes)."""
        return torch.cat([self.rest(self.targets[part]) for part in self.parts()])

    def gradient(self, out: Tensor, picks: slice | Tensor, temperature: float = 1.0) -> Tensor:
        """The gradient, image by image, of KL(float || quantized) at an output (B, ...) of the unit.

        Args:
            out: of the unit, for the images of ``picks``.
            picks: which of all images.
            temperature: divides the logits.
        """
        with torch.enable_grad():
            out = out.detach().requires_grad_()
            found, target = self.rest(out) / temperature, self.logits[picks] / temperature
            loss = F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
            return torch.autograd.grad(loss, out)[0]


def rows_of(batches: Sequence[Tensor]) -> Rows:
    """Batches as a tensor of all images; images themselves are copied together."""
    return batches.rows if isinstance(batches, Batches) else Rows(torch.cat(tuple(batches)), batches[0].device)
