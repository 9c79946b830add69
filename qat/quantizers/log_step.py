"""Steps that are learned as logarithms: one learning rate is right for every step, whatever its size.

An optimizer such as Adam moves a parameter by its learning rate, so that a step of 0.002 and one of 0.5 need rates of
their own; the logarithm of either moves by the same part of the step, which is above zero by construction.
Shapes: G groups that share a step.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.quantizer import Quantizer
from qat.quantizers.space import Table


class LogStep(Quantizer):
    """Comes before a quantizer's class: parameter ``log_step`` (G,) takes the place of ``step``."""

    holds_step = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log_step = nn.Parameter(torch.full((self.layout.groups,), torch.nan))

    @property
    def step(self) -> Tensor:  # type: ignore[override]
        """The step (G,)."""
        return self.log_step.exp()

    def set_(self, row: Table) -> None:
        """Give parameters and buffers the values (G,) of a row of a table, which has steps."""
        super().set_({("log_step" if name == "step" else name): self._stored(name, row[name]) for name in row})

    def _stored(self, name: str, values: Tensor) -> Tensor:
        return values.clamp(min=self.smallest_step).log() if name == "step" else values

    @torch.no_grad()
    def project_(self) -> None:
        """Keep steps at the limit, for what is far below it would divide by zero."""
        self.log_step.clamp_(min=log(self.smallest_step))

    def illegal(self, site: str, values: Table) -> str:
        """A logarithm of a step that is no number, or so small or large that there is no such step."""
        least, most = log(self.smallest_step), log(torch.finfo(torch.float32).max)
        wrong = values["log_step"][~((values["log_step"] >= least) & (values["log_step"] <= most))]
        if not len(wrong):
            return ""
        return f"a log_step of {site!r} is {float(wrong[0]):g}; logarithms of steps lie from {least:.0f} to {most:.0f}"
