"""What is learned about the quantizers of activations while a unit is reconstructed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qat.quantizers import Quantizer


class LearnedSteps:
    """Steps, as they are or as logarithms, and the ends of intervals, as they are.

    With logarithms one learning rate is right for every size of a step. The steps that a forward reads are leaves of
    their own; gradients and values go back and forth between them and their logarithms.

    Args:
        quantizers: calibrated.
        steps: learn steps.
        logarithms: learn them as logarithms.
        intervals: learn the ends of intervals, where they take the place of a step.
    """

    def __init__(self, quantizers: Iterable[Quantizer], steps: bool, logarithms: bool, intervals: bool) -> None:
        self.quantizers = [q for q in quantizers if (steps if q.holds_step else intervals)]
        self.logarithms = logarithms
        with_step = [quantizer for quantizer in self.quantizers if quantizer.holds_step]
        self.read = [quantizer.step for quantizer in with_step]
        self.steps = [nn.Parameter(step.detach().log()) for step in self.read] if logarithms else list(self.read)
        self.ends = [p for q in self.quantizers if not q.holds_step for p in q.parameters()]

    @property
    def leaves(self) -> list[nn.Parameter]:
        """What a forward reads."""
        return [*self.read, *self.ends]

    def take_gradients(self) -> None:
        """Turn the gradients of steps into those of their logarithms: d/dln(s) = s * d/ds."""
        if self.logarithms:
            for step, log in zip(self.read, self.steps, strict=True):
                log.grad = None if step.grad is None else step.grad * step.detach()
                step.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Give the quantizers what has been learned, and keep it legal."""
        if self.logarithms:
            for step, log in zip(self.read, self.steps, strict=True):
                step.copy_(log.exp())
        for quantizer in self.quantizers:
            quantizer.project_()
