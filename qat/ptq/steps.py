"""Calibrations that are lists of steps: those that a user puts together, and those that a paper has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Any

from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.base import PTQMethod
from qat.ptq.step import Step, check_partners, run
from qat.ptq.work import Prefix
from qat.ranges import Range, check_fields

QUANTIZED: Prefix = "quantized"


class Preset(PTQMethod):
    """A method that is a list of steps."""

    changes_weights = True
    prefix = QUANTIZED  # without annotations, as in `PTQMethod`
    importance = 0.0

    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """The steps, in their order."""

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Run the steps."""
        run(self, self.steps(), model, batches, self.prefix, self.importance)


@dataclass
class Steps(Preset):
    """A calibration put together from steps.

    Args:
        list: the steps: rewrites first, then first parameters, searches, weights, biases, reconstruction.
        prefix: what units see: the output of the units before them as they are ``quantized``, or as ``float``.
        importance: share by which searches and corrections count the rows of a layer's output, which are tokens, by
            the Fisher information of the float model's predictions; they count alike for the rest.
    """

    list: Sequence[Step]
    prefix: Prefix = "quantized"
    importance: Annotated[float, Range(low=0, high=1)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_order(self.list)
        check_partners(self.list)
        for step in self.list if self.prefix == "float" else ():
            if step.needs_quantized:
                raise QatError(f"Steps: {type(step).__name__} reads what quantized units give: leave prefix: float out")

    def steps(self) -> Sequence[Step]:
        """The list."""
        return self.list


def options_of(preset: Any, kind: type) -> dict[str, Any]:
    """The values that a preset has for the fields of a dataclass that it shares with its step."""
    return {field.name: getattr(preset, field.name) for field in fields(kind)}


def check_order(steps: Sequence[Step]) -> None:
    """Raise QatError for a list that is empty, or that has a step of an earlier stage after one of a later."""
    if not steps:
        raise QatError("Steps: the list is empty: name at least one step, such as {class_path: OutputSearch}")
    for before, after in pairwise(steps):
        if after.stage < before.stage:
            raise QatError(
                f"Steps: {type(after).__name__} comes after {type(before).__name__}: the order is rewrites, first "
                "parameters, searches, weights, biases, reconstruction"
            )
