"""Moving the parameters of many quantizers back to legal values in a few launches, after every optimizer step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from qat.quantizers.quantizer import Quantizer


class Projection:
    """`Quantizer.project_` of every quantizer, with one launch for each distinct limit instead of one for each step.

    Args:
        quantizers: whose parameters are projected; a kind with a ``project_`` of its own keeps it.
    """

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        self.steps: dict[float, list[Tensor]] = defaultdict(list)  # by the limit of a step
        self.others: list[Quantizer] = []
        for quantizer in quantizers:
            if type(quantizer).project_ is Quantizer.project_:
                self.steps[quantizer.smallest_step].append(quantizer.step)
            else:
                self.others.append(quantizer)

    @torch.no_grad()
    def __call__(self) -> None:
        """Project all of them, in place."""
        for limit, steps in self.steps.items():
            torch._foreach_clamp_min_(steps, limit)
        for quantizer in self.others:
            quantizer.project_()
