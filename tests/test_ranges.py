"""Ranges: what a value must be, and how an error and the help say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from qat.errors import QatError
from qat.ranges import Range, check_fields, checked, describe_hint, fits

Rate = Annotated[float, Range(above=0, high=10)]


@dataclass(frozen=True)
class Options:
    lr: Rate = 1e-3
    bits: Annotated[int, Range(2, 8)] | None = None
    betas: tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]] = (0.9, 0.999)
    mode: Literal["error", "skip"] = "error"
    path: Path | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "model.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.0}, "model.lr is 0.0: give a number above 0 and at most 10"),
        ({"lr": math.nan}, "model.lr is nan: give a number above 0 and at most 10"),
        ({"lr": math.inf}, "model.lr is inf"),
        ({"lr": True}, "model.lr is True"),
        ({"lr": "1"}, "model.lr is '1'"),
        ({"bits": 1}, "model.bits is 1: give an integer from 2 to 8 or null"),
        ({"bits": 4.0}, "model.bits is 4.0"),
        ({"betas": (0.9,)}, r"model.betas is \(0.9,\): give two values, each a number of at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, "model.betas"),
        ({"mode": "ignore"}, "model.mode is 'ignore': give error or skip"),
        ({"flag": 1}, "model.flag is 1: give true or false"),
        ({"bits": 10**5000}, r"model.bits is 10\*\*80 or more: give"),
        ({"mode": "x" * 500}, "model.mode is 'x{79}...: give error or skip"),
        ({"mode": "x\ny"}, r"model.mode is 'x\\ny': give"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(given, message):
    with pytest.raises(QatError, match=message):
        Options(**given)


def test_values_in_range_are_taken():
    taken = Options(lr=1, bits=np.int64(4), betas=[0.0, 0.5], path="x", mode="skip", flag=True)
    assert (taken.lr, taken.bits, taken.betas, taken.path, taken.mode) == (1, 4, [0.0, 0.5], "x", "skip")


def test_arguments_of_a_constructor_are_checked_before_it_runs():
    class Tracker:
        @checked
        def __init__(self, every: Annotated[int, Range(1)] = 100, **rest: int) -> None:
            self.every = every

    assert Tracker().every == 100
    with pytest.raises(QatError, match="Tracker: every is 0: give an integer of at least 1"):
        Tracker(0)


def test_lists_of_numbers_with_a_range():
    shares = Sequence[Annotated[float, Range(above=0.5, high=1)]]
    assert fits([0.9, 1], shares)
    assert fits((0.9,), shares)
    assert not fits([0.9, 0.5], shares)
    assert not fits("0.9", shares)
    assert describe_hint(shares) == "a list, each item a number above 0.5 and at most 1"
    assert describe_hint(tuple[Annotated[int, Range(1)], ...]) == "a list, each item an integer of at least 1"
    assert str(Range(1, 1_000_000)) == "from 1 to 1,000,000"


def test_nested_hints():
    assert fits([{"a": 1}], list[dict[str, int]])
    assert not fits({"a": 1}, list[dict[str, int]])
    assert describe_hint(list[str] | None) == "a list, each item text or null"
