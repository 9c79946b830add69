"""What is learned about the weight of a layer while its unit is reconstructed.

A `WeightRule` states a way, as options; a `LearnedWeight` is one weight that follows it. It stands in the place of the
weight's quantizer, is given the weight as it was, and returns the values that the layer multiplies by. In the end it
becomes a plain weight, which the quantizer rounds to the very same values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from qat.ptq.reconstruction.adam import Adam, Group
from qat.quantizers import Quantizer
from qat.sites.insert import WeightSite

Schedule = Literal["constant", "cosine"]


class LearnedWeight(nn.Module, ABC):
    """One weight; its own parameters are what is learned.

    Args:
        quantizer: of the weight, calibrated; its parameters stay.
        weight: before it is learned.

    Attributes:
        stays_float: in the end the weight has no quantizer, and is what the layer multiplied by.
    """

    stays_float = False

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The values that the layer multiplies by, in evaluation mode those of the end."""

    def regularizer(self, progress: float) -> Tensor | None:
        """What is added to the loss, at a share 0 to 1 of all iterations."""
        return None

    @abstractmethod
    def folded(self, weight: Tensor) -> Tensor:
        """A plain weight for which the quantizer, if there is one, gives the very values of evaluation mode."""

    @property
    def bits_per_weight(self) -> float:
        """What a device has to keep for each weight."""
        return self.quantizer.spec.width

    def learned(self) -> list[nn.Parameter]:
        """The parameters that are learned."""
        own = {id(parameter) for parameter in self.quantizer.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]


class WeightRule(ABC):
    """How weights are learned.

    Attributes:
        lr: learning rate of Adam; 0 where nothing is learned.
        schedule: what becomes of it.
        ticks: iterations of `prepare`.
    """

    lr = 0.0
    schedule: Schedule = "cosine"
    ticks = 0

    def prepare(  # noqa: B027  most rules have nothing to choose
        self, sites: Sequence[WeightSite], train: StartTraining, generator: torch.Generator
    ) -> None:
        """Choose, before the weights (sites) of a unit start, what cannot be chosen for all units alike."""

    def prepared(self) -> Any:
        """What `prepare` has chosen so far, as plain data."""
        return None

    def restore(self, prepared: Any) -> None:  # noqa: B027  most rules have nothing to choose
        """Choose what an earlier process has chosen."""

    def check(self, site: WeightSite) -> None:  # noqa: B027  most rules can learn every weight
        """Raise QatError, before any work, for a weight that cannot be learned in this way."""

    @abstractmethod
    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight | None:
        """A weight at its start; None where nothing is learned about it."""


class UnitTraining(Protocol):
    """The training of a unit, as far as a rule takes part in it."""

    images: Tensor
    groups: list[Group]
    batch: int
    title: str

    def learning(self) -> AbstractContextManager[None]:
        """Gradients for what is learned, inside the block."""

    def iterate(self, adam: Adam, picks: Tensor, progress: float) -> None:
        """One step on the loss of some images."""


StartTraining = Callable[[Mapping[str, LearnedWeight]], AbstractContextManager[UnitTraining]]


@dataclass
class Nearest(WeightRule):
    """Weights stay as they are; only steps of activations are learned."""

    def start(self, site: WeightSite, generator: torch.Generator) -> LearnedWeight | None:
        """Nothing."""
        return None
