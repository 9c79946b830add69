"""Draw the training loss and the validation top-1 of runs.

    python tools/plot_runs.py --out docs/fewshot.png runs/w4a4/DATE runs/w3a3/DATE

Each folder is one of a `qat fit` run. Its metrics.csv has the loss of single batches, so the curve is a running mean.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from qat.cli.scripts import Parser, run_script
from qat.errors import QatError, first_line

WINDOW = 10  # logged steps in the running mean


def curve(folder: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of metrics.csv; QatError if the file cannot be read."""
    path = folder / "metrics.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise QatError(f"cannot read {path}: {first_line(error)}; give the folder of a `qat fit` run") from None
    return [step for step, _ in rows], [value for _, value in rows]


def plot(folders: list[Path], out: Path) -> None:
    """Draw training loss (left) and validation top-1 (right) over steps; QatError for a run without a loss."""
    if out.is_dir():
        raise QatError(f"out is {out}, a folder: give the name of a file")
    curves = {folder: (curve(folder, "train/loss"), curve(folder, "val/top1")) for folder in folders}
    for folder, ((_, losses), _) in curves.items():
        if not losses:
            raise QatError(f"{folder / 'metrics.csv'} has no training loss yet: give a run that has logged some steps")
    try:
        import matplotlib
    except ImportError as error:
        raise QatError(f"pictures need matplotlib ({error}): pip install 'qat[demo]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for folder, ((steps, losses), top1) in curves.items():
        window = min(WINDOW, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        (line,) = left.plot(steps[window - 1 :], smooth, label=folder.resolve().parent.name)
        left.plot(steps, losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
        right.plot(*top1, "o-", label=folder.resolve().parent.name)
    left.set(xlabel="optimizer step", ylabel="training loss (soft cross-entropy)")
    right.set(xlabel="optimizer step", ylabel="validation top-1, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise QatError(f"cannot write {out}: {first_line(error)}; give another --out, such as curves.png") from None


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and draw; 0, or 2 with one line on stderr for bad input."""
    parser = Parser(prog="plot_runs", description="Draw the loss curves of runs.")
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, each with a metrics.csv")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    return run_script(parser, lambda args: plot(args.folders, args.out), arguments)


if __name__ == "__main__":
    sys.exit(main())
