"""What the output of a unit is compared by. Every loss is 1 at its start.

Shapes: B images of a batch, n all images, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.ptq.reconstruction.unit_data import UnitData
from qat.ranges import Range

TINY = 1e-30
Temperature = Annotated[float, Range(above=0, high=1000)]


class Part(Protocol):
    """What a loss remembers from one iteration to the next."""

    def state(self) -> Any:
        """It, as plain data and tensors."""

    def load(self, state: Any) -> None:
        """Remember it again."""


class UnitLoss:
    """The loss of one unit.

    Args:
        value: from the output of the unit (B, ...), and which of all images it is for (B,), to a scalar.
        parts: what it remembers.
        refresh: is called before every iteration, with the share 0 to 1 of all of them; the unit is then as it will be.
        version: a number that changes when values can no longer be compared with earlier ones.
    """

    def __init__(
        self, value: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Part] = (),
        refresh: Callable[[float], None] = lambda progress: None, version: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.value, self.parts, self.refresh, self.version = value, parts, refresh, version

    def __call__(self, out: Tensor, picks: Tensor) -> Tensor:
        """The value."""
        return self.value(out, picks)

    def state(self) -> list[Any]:
        """What it remembers."""
        return [part.state() for part in self.parts]

    def load(self, state: list[Any]) -> None:
        """Remember it again."""
        for part, own in zip(self.parts, state, strict=True):
            part.load(own)


class ReconstructionLoss(ABC):
    """A way to compare outputs, as options."""

    @abstractmethod
    def start(self, data: UnitData) -> UnitLoss:
        """The loss of one unit."""


class PerFirst:
    """Divides a value by its first one, so that it starts at 1 and sums of several mean something."""

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The quotient; a first value of zero stays as it is."""
        if self.first is None:
            found = value.detach()
            self.first = torch.where(found > TINY, found, torch.ones_like(found))
        return value / self.first

    def state(self) -> Tensor | None:
        """The first value."""
        return self.first

    def load(self, state: Tensor | None) -> None:
        """Divide by it from now on."""
        self.first = state


@dataclass
class MSE(ReconstructionLoss):
    """The squared error."""

    def start(self, data: UnitData) -> UnitLoss:
        """Over its first value."""
        first = PerFirst()
        return UnitLoss(lambda out, picks: first((out - data.targets[picks]).square().mean()), [first])


@dataclass
class Logits(ReconstructionLoss):
    """KL of the logits alone: for the head, and for a unit whose output nothing else has to resemble."""

    def start(self, data: UnitData) -> UnitLoss:
        """Over its first value."""
        first = PerFirst()
        return UnitLoss(lambda out, picks: first(divergence(data.rest(out), data.logits[picks])), [first])


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || logits), the mean over images."""
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
