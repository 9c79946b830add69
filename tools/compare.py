"""Top-1 of predictions, and the difference of each to the first with a 95 % paired interval.

    python tools/compare.py float.csv w4a4_calibrated.csv w4a4.csv

Each file is the output of `qat predict` on the same class folders: the folder of an image is its class. The interval is
that of the mean of per-image differences (-1, 0 or 1), 1.96 standard errors to each side: images that both models get
right, or wrong, say nothing about which is better, so pairing makes it narrower than two separate intervals.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from qat.errors import QatError


def hits(path: Path) -> dict[str, bool]:
    """Image -> whether its most probable class is its folder; QatError if the file is no table of predictions."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"path", "class_1"} <= set(rows[0]):
        raise QatError(f"{path} is not an output of `qat predict`")
    return {row["path"]: Path(row["path"]).parent.name == row["class_1"] for row in rows}


def interval(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    return float(differences.mean()), 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5


def compare(paths: list[Path]) -> Table:
    """One line per file."""
    found = [hits(path) for path in paths]
    names = sorted(found[0])
    for path, other in zip(paths, found, strict=True):
        if set(other) != set(names):
            raise QatError(f"{path} is about other images than {paths[0]}")
    scores = [np.array([100.0 * result[name] for name in names]) for result in found]
    table = Table(box=box.SIMPLE_HEAD, caption=f"{len(names)} images; +- is half of a 95 % interval")
    for column in ("predictions", "top-1 %", f"minus {paths[0].stem}"):
        table.add_column(column, justify="left" if column == "predictions" else "right")
    for path, score in zip(paths, scores, strict=True):
        own, half = interval(score)
        difference, paired = interval(score - scores[0])
        table.add_row(path.stem, f"{own:.1f} +- {half:.1f}", f"{difference:+.1f} +- {paired:.1f}")
    return table


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description="Compare predictions on the same images, pairwise.")
    parser.add_argument("predictions", type=Path, nargs="+", help="outputs of `qat predict`; the first is the baseline")
    try:
        Console().print(compare(parser.parse_args().predictions))
    except (QatError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
