"""Steps of activations that are learned as logarithms: one learning rate is right for every size of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qat.quantizers import Quantizer


class LogSteps:
    """The logarithms of the steps of quantizers; gradients and values go back and forth between the two.

    Args:
        quantizers: calibrated.
    """

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        self.steps = [quantizer.step for quantizer in quantizers]
        self.logs = [nn.Parameter(step.detach().log()) for step in self.steps]

    def take_gradients(self) -> None:
        """Turn the gradients of steps into those of their logarithms: d/dln(s) = s * d/ds."""
        for step, log in zip(self.steps, self.logs, strict=True):
            log.grad = None if step.grad is None else step.grad * step.detach()
            step.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Give the steps the values of their logarithms."""
        for step, log in zip(self.steps, self.logs, strict=True):
            step.copy_(log.exp())


class PlainSteps:
    """Steps that are learned as they are."""

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        self.quantizers = list(quantizers)
        self.logs: list[nn.Parameter] = [quantizer.step for quantizer in self.quantizers]

    def take_gradients(self) -> None:
        """Nothing to turn."""

    def write(self) -> None:
        """Keep them positive."""
        for quantizer in self.quantizers:
            quantizer.project_()


def values_of(steps: LogSteps | PlainSteps) -> list[Tensor]:
    """What is kept with the best weights."""
    return [log.detach().clone() for log in steps.logs]
