"""Compare predictions: the top-1 of each file, and its difference to that of the first file with a 95 % interval.

    python tools/compare.py float.csv w4a4_calibrated.csv w4a4.csv

Each file is the output of `qat predict` on the same class folders; the name of an image's folder is its class. The
differences are paired: each image gives -1, 0 or 1, and the interval reaches 1.96 standard errors of their mean to each
side. Images that both models get right, or both wrong, do not widen it, as they would widen two separate intervals.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from qat.cli.scripts import Parser, run_script
from qat.errors import QatError, first_line


def hits(path: Path) -> dict[str, bool]:
    """For every image, whether its most probable class is its folder; QatError if the file holds no predictions."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = set(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise QatError(f"cannot read {path}: {first_line(error)}; give an output of `qat predict`") from None
    if not {"path", "class_1"} <= columns:
        raise QatError(f"{path} is not an output of `qat predict`: it has no columns path and class_1")
    if not rows:
        raise QatError(f"{path} holds no predictions: run `qat predict` on a folder with images")
    found: dict[str, bool] = {}
    for row in rows:
        image, guess = row["path"], row["class_1"]
        if not image or not guess or image in found:
            what = f"has {image!r} twice" if image in found else f"has a line without path or class: {image!r}"
            raise QatError(f"{path} {what}; run `qat predict` again")
        found[image] = Path(image).parent.name == guess
    return found


def interval(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; infinite for a single image, which has no spread."""
    if len(differences) < 2:
        return float(differences.mean()), float("inf")
    return float(differences.mean()), 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5


def compare(paths: list[Path]) -> Table:
    """A table with one line for each file; QatError for a file that cannot be compared with the first."""
    found = [hits(path) for path in paths]
    names = sorted(found[0])
    for path, other in zip(paths, found, strict=True):
        if set(other) != set(names):
            raise QatError(f"{path} has other images than {paths[0]}: predict the same folder with every model")
    scores = [np.array([100.0 * result[name] for name in names]) for result in found]
    table = Table(box=box.SIMPLE_HEAD, caption=f"{len(names)} images; +- half of a 95 % interval")
    for column in ("predictions", "top-1 %", f"minus {paths[0].stem}"):
        table.add_column(column, justify="left" if column == "predictions" else "right")
    for path, score in zip(paths, scores, strict=True):
        own, half = interval(score)
        difference, paired = interval(score - scores[0])
        table.add_row(path.stem, f"{own:.1f} +- {half:.1f}", f"{difference:+.1f} +- {paired:.1f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and print the table; 0, or 2 with one line on stderr for bad input."""
    parser = Parser(prog="compare", description="Compare the predictions of several models on the same images.")
    parser.add_argument("predictions", type=Path, nargs="+", help="outputs of `qat predict`; the first is the baseline")
    return run_script(parser, lambda args: Console().print(compare(args.predictions)), arguments)


if __name__ == "__main__":
    sys.exit(main())
