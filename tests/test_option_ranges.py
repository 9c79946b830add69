"""Every range that an annotation states: its ends are taken, what lies just outside is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest

from qat.callbacks import FrozenCodes, GradientRatio, IterativeFreezing, OscillationTracker, WeightAverage
from qat.data.crops import CropDistribution
from qat.data.options import DataOptions
from qat.errors import QatError
from qat.labeling import import_fkd, plan
from qat.preprocessing import Preprocessing
from qat.ptq import GLFQ, AIQViT, InitSteps, Observe, OutputSearch, QDrop, Reconstruct, RepQViT
from qat.ptq.options import CalibrationOptions
from qat.ptq.reconstruction.adaround import AdaRound
from qat.ptq.reconstruction.curriculum import Curriculum
from qat.ptq.reconstruction.low_rank import LowRank, RankSearch
from qat.ranges import Range
from qat.training.features import FeatureOptions
from qat.training.options import ModelOptions
from qat.training.regularizers import BinRegularizer, Dampening

HERE = Path(__file__).parent
LABELS: dict[str, Any] = {"data": plan.Folder(HERE), "teacher": "x", "out": HERE / "none.h5"}
NEEDED: dict[type, dict[str, Any]] = {
    plan.Options: LABELS,
    FeatureOptions: {"modules": ["blocks.0"]},
    import_fkd.Options: {**LABELS, "labels": HERE, "label_type": "ori"},
    Preprocessing: {"size": 1, "resize": 16384, "interpolation": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1)},
}
KINDS: list[type] = [
    ModelOptions, DataOptions, CalibrationOptions, CropDistribution, *NEEDED, Observe, OutputSearch, InitSteps, RepQViT,
    BinRegularizer, Dampening, OscillationTracker, IterativeFreezing, GradientRatio, WeightAverage,
    FrozenCodes, FeatureOptions, QDrop, AIQViT, GLFQ, Reconstruct, AdaRound, LowRank, RankSearch, Curriculum,
]  # fmt: skip


class Ranged(NamedTuple):
    """A field with a range, and how a number becomes a value of the field."""

    kind: type
    name: str
    number: type
    range: Range
    wrap: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.kind.__module__.rpartition('.')[2]}.{self.kind.__name__}.{self.name}"

    def build(self, number: Any) -> None:
        self.kind(**{**NEEDED.get(self.kind, {}), self.name: self.wrap(number)})


def ranges(hint: Any, wrap: Callable[[Any], Any]) -> Iterator[tuple[type, Range, Callable[[Any], Any]]]:
    """The ranges inside an annotation: type of the number, its range, and how it becomes a value."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from ((parts[0], part, wrap) for part in parts[1:] if isinstance(part, Range))
    elif origin in (Union, UnionType):
        for part in parts:
            yield from ranges(part, wrap)
    elif origin is tuple:
        yield from ranges(parts[0], lambda number: wrap((number,) * len(parts)))
    elif origin is Sequence:
        yield from ranges(parts[0], lambda number: wrap([number]))


def fields_with_ranges() -> Iterator[Ranged]:
    for kind in KINDS:
        hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__, include_extras=True)
        for name, hint in hints.items():
            for number, range_, wrap in ranges(hint, lambda value: value):
                yield Ranged(kind, name, number, range_, wrap)


def beside(end: float, towards: float, number: type) -> float:
    """The next number of a type, in a direction."""
    return end + int(math.copysign(1, towards)) if number is int else math.nextafter(end, towards)


def outside(field: Ranged) -> list[Any]:
    low, high, above, below = field.range.low, field.range.high, field.range.above, field.range.below
    found: list[Any] = [end for end in (above, below) if end is not None]
    found += [beside(low, -math.inf, field.number)] if low is not None else []
    found += [beside(high, math.inf, field.number)] if high is not None else []
    return [*found, math.nan, math.inf, -math.inf, "1", True, 10**400 if high or below else None]


def inside(field: Ranged) -> list[float]:
    found = [end for end in (field.range.low, field.range.high) if end is not None]
    found += [math.nextafter(field.range.above, math.inf)] if field.range.above is not None else []
    found += [math.nextafter(field.range.below, -math.inf)] if field.range.below is not None else []
    return found


def refusal(field: Ranged, number: float) -> str:
    """The error for a number, such as that of another option which contradicts it; nothing where it is taken."""
    try:
        field.build(number)
    except QatError as error:
        return str(error)
    return ""


FIELDS = list(fields_with_ranges())


def test_all_kinds_of_options_state_ranges() -> None:
    assert {field.kind for field in FIELDS} == set(KINDS)
    assert len(FIELDS) > 70


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_what_lies_outside_is_refused_by_name(field: Ranged) -> None:
    for number in outside(field):
        if number is not None:
            with pytest.raises(QatError, match=rf"{field.name} is .*: give ") as refused:
                field.build(number)
            assert len(str(refused.value)) < 300


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_the_ends_are_taken(field: Ranged) -> None:
    for number in inside(field):
        assert f"{field.name} is {field.wrap(number)!r}: give a" not in refusal(field, number)


def bare_numbers(hint: Any) -> Iterator[type]:
    """Numbers in an annotation that have no range."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in (int, float):
        yield hint
    elif origin is Annotated and not any(isinstance(part, Range) for part in parts):
        yield from bare_numbers(parts[0])
    elif origin in (Union, UnionType, tuple, list, Sequence):
        for part in parts:
            yield from bare_numbers(part)


def test_no_number_is_without_a_range() -> None:
    found = {
        f"{kind.__name__}.{name}"
        for kind in KINDS
        for name, hint in get_type_hints(kind if is_dataclass(kind) else kind.__init__, include_extras=True).items()
        if list(bare_numbers(hint))
    }
    assert found <= {"Options.devices"}  # a number, a list of numbers or a word: Lightning knows the devices
