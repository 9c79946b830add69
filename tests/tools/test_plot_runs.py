"""Curves of runs: what is read from metrics.csv, the picture, and runs that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tools import plot_runs

METRICS = "step,train/loss,val/top1\n0,2.0,\n1,1.0,\n1,,50.0\n"


def run_folder(root: Path, metrics: str | None) -> Path:
    """The folder of a run that has logged this."""
    folder = root / "w4a4" / "2026-01-01"
    folder.mkdir(parents=True)
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    return folder


def test_a_curve_has_the_steps_at_which_its_column_was_logged(tmp_path):
    folder = run_folder(tmp_path, METRICS)
    assert plot_runs.curve(folder, "train/loss") == ([0, 1], [2.0, 1.0])
    assert plot_runs.curve(folder, "val/top1") == ([1], [50.0])
    assert plot_runs.curve(folder, "lr") == ([], [])


@pytest.mark.parametrize("metrics", [METRICS, "step,train/loss\n0,2.0\n"], ids=["validated", "not validated yet"])
def test_a_picture_is_written(metrics, tmp_path):
    folder = run_folder(tmp_path, metrics)
    plot_runs.main([str(folder), "--out", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").size == (1100, 396)  # 10 x 3.6 inches at 110 dots


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "cannot read .*metrics.csv: "),
        ("", "metrics.csv has no training loss yet"),
        ("step,train/loss\n", "metrics.csv has no training loss yet"),
        ("step,val/top1\n1,50.0\n", "metrics.csv has no training loss yet"),
        ("train/loss\n2.0\n", "cannot read .*metrics.csv: "),
        ("step,train/loss\n0,abc\n", "cannot read .*metrics.csv: "),
    ],
    ids=["missing", "empty", "no rows", "no loss", "no steps", "no number"],
)
def test_a_run_that_cannot_be_drawn_ends_in_one_line(metrics, message, tmp_path):
    folder = run_folder(tmp_path, metrics)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as stop:
        plot_runs.main([str(folder), "--out", str(tmp_path / "curves.png")])
    assert "\n" not in str(stop.value.code)
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_that_cannot_be_written_ends_in_one_line(tmp_path):
    folder = run_folder(tmp_path, METRICS)
    with pytest.raises(SystemExit, match=r"error: .*No such file or directory"):
        plot_runs.main([str(folder), "--out", str(tmp_path / "none" / "curves.png")])
