"""What is learned about the quantizers of activations while a unit is reconstructed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qat.quantizers import Quantizer
from qat.quantizers.log_step import LogStep


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
        free = [q for q in quantizers if not getattr(q.spec, "unit", False)]  # AdaLog can have a step of 1 for good
        has_step = {q: q.holds_step or isinstance(q, LogStep) for q in free}
        self.quantizers = [q for q, has in has_step.items() if (steps if has else intervals)]
        self.logarithms = logarithms
        self.read = [q.step for q in self.quantizers if q.holds_step]
        own = [q.log_step for q in self.quantizers if isinstance(q, LogStep)]
        self.steps = own + ([nn.Parameter(step.detach().log()) for step in self.read] if logarithms else self.read)
        self.ends = [p for q in self.quantizers if not has_step[q] for p in q.parameters()]
        self.leaves = [*self.read, *own, *self.ends]  # what a forward reads

    def take_gradients(self) -> None:
        """Turn the gradients of steps into those of their logarithms: d/dln(s) = s * d/ds."""
        if self.logarithms and self.read:
            for step, log in zip(self.read, self.steps[-len(self.read) :], strict=True):
                log.grad = None if step.grad is None else step.grad * step.detach()
                step.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Give the quantizers what has been learned, and keep it legal."""
        if self.logarithms and self.read:
            for step, log in zip(self.read, self.steps[-len(self.read) :], strict=True):
                step.copy_(log.exp())
        for quantizer in self.quantizers:
            quantizer.project_()
