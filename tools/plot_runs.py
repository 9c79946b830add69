"""Loss curves of runs as a picture.

    python tools/plot_runs.py --out docs/fewshot.png runs/w4a4/DATE runs/w3a3/DATE

Each folder is that of a `qat fit` run; its metrics.csv has the loss of single batches, so the curve is a running mean.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

WINDOW = 10  # logged steps in the running mean


def curve(folder: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of metrics.csv."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    return [step for step, _ in rows], [value for _, value in rows]


def plot(folders: list[Path], out: Path) -> None:
    """Training loss (left) and validation top-1 (right) over optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for folder in folders:
        steps, losses = curve(folder, "train/loss")
        window = min(WINDOW, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        (line,) = left.plot(steps[window - 1 :], smooth, label=folder.parent.name)
        left.plot(steps, losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
        right.plot(*curve(folder, "val/top1"), "o-", label=folder.parent.name)
    left.set(xlabel="optimizer step", ylabel="training loss (soft cross-entropy)")
    right.set(xlabel="optimizer step", ylabel="validation top-1, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw the loss curves of runs.")
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, each with a metrics.csv")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    plot(args.folders, args.out)


if __name__ == "__main__":
    main()
