"""A class map gives the label of every class folder (``data.class_map``), in the format of timm or as a table.

| file | content |
|---|---|
| .txt, as in timm | the name of one class per line; the first line has label 0 |
| .csv | a name and its label per line |
| .json | an object ``{"name": label}``, or a list of names |

timm also reads pickles. They can run code when they are read, so they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from qat.data.folder import DIGITS
from qat.data.label_file import read_csv, read_text
from qat.errors import QatError
from qat.ranges import shown

OPTION = "data.class_map"
Entry = tuple[str, str, Any]  # place in the file, name, label


@cache
def read_class_map(file: Path) -> tuple[str, ...]:
    """The names of the class folders in the order of their labels.

    Raises:
        QatError: the file cannot be read, or does not give every label from 0 on to one class.
    """
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for place, name, number in _entries(file):
        label = _as_label(number)
        if label is None or not name:
            raise QatError(
                f"{place}: expected the name of a class and its label, 0 or more, found {shown(name)}, {shown(number)}"
            )
        if name in labels:
            raise QatError(f"{place}: the class {name!r} has the label {labels[name]} already")
        if label in names:
            raise QatError(f"{place}: the label {label} belongs to the class {names[label]!r} already")
        names[label], labels[name] = name, label
    if missing := sorted(set(range(len(names))) - set(names)):
        raise QatError(f"{file} gives the label {missing[0]} to no class: labels are 0..{len(names) - 1}")
    if not names:
        raise QatError(f"{file} has no class")
    return tuple(names[label] for label in range(len(names)))


def _entries(file: Path) -> Iterable[Entry]:
    """What the file says, by the suffix of its name."""
    match file.suffix.lower():
        case ".txt":
            return _of_lines(file)
        case ".csv":
            return _of_table(file)
        case ".json":
            return _of_json(file)
        case ".pkl" | ".pickle":
            raise QatError(f"{OPTION} is {file}: a pickle can run code, so write it as .txt, one class per line")
        case _:
            raise QatError(f"{OPTION} is {file}: give a .txt file with one class per line, a .csv or a .json file")


def _of_lines(file: Path) -> Iterable[Entry]:
    lines = [line.strip() for line in read_text(file, OPTION)]
    while lines and not lines[-1]:
        lines.pop()
    return [(f"{file}, line {label + 1}", name, label) for label, name in enumerate(lines)]


def _of_table(file: Path) -> Iterable[Entry]:
    rows = list(read_csv(file, OPTION))
    if rows and len(rows[0][1]) == 2 and _as_label(rows[0][1][1]) is None:
        rows = rows[1:]  # the names of the columns
    for number, row in rows:
        if len(row) != 2:
            raise QatError(
                f"{file}, line {number}: expected the name of a class and its label, found {shown(','.join(row))}"
            )
        yield f"{file}, line {number}", row[0], row[1]


def _of_json(file: Path) -> Iterable[Entry]:
    try:
        found = json.loads("\n".join(read_text(file, OPTION)))
    except (ValueError, RecursionError) as error:
        raise QatError(f"{OPTION}: {file} is no JSON: {error}") from None
    if isinstance(found, list) and (wrong := [name for name in found if isinstance(name, list | dict)]):
        raise QatError(f"{file} has a {type(wrong[0]).__name__} where the name of a class belongs")
    pairs = dict(zip(map(str, found), range(len(found)), strict=True)) if isinstance(found, list) else found
    if not isinstance(pairs, dict):
        raise QatError(f"{OPTION}: {file} holds a {type(found).__name__}: give an object of labels or a list of names")
    if isinstance(found, list) and len(pairs) < len(found):
        raise QatError(f"{file} names a class twice")
    return [(str(file), str(name), label) for name, label in pairs.items()]


def _as_label(value: Any) -> int | None:
    """A label written as an integer or as its digits; None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) <= DIGITS:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
