"""Curves of runs: what is read from metrics.csv, the picture, and runs that have none."""

from __future__ import annotations

import re
import sys
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
    assert plot_runs.main([str(folder), "--out", str(tmp_path / "curves.png")]) == 0
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
        ("train/loss,step\n2.0\n", "cannot read .*metrics.csv: "),
    ],
    ids=["missing", "empty", "no rows", "no loss", "no steps", "no number", "short row"],
)
def test_a_run_that_cannot_be_drawn_ends_in_one_line(metrics, message, tmp_path, capsys):
    folder = run_folder(tmp_path, metrics)
    assert plot_runs.main([str(folder), "--out", str(tmp_path / "curves.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"plot_runs: error: .*{message}", line)
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_that_cannot_be_written_ends_in_one_line(tmp_path, capsys):
    folder = run_folder(tmp_path, METRICS)
    for out, message in (
        ("none/curves.png", "No such file or directory"),
        ("curves.xyz", "Format 'xyz' is not supported"),
        (".", "a folder: give the name of a file"),
    ):
        assert plot_runs.main([str(folder), "--out", str(tmp_path / out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("plot_runs: error: ")
        assert message in line


def test_without_matplotlib_one_line_names_the_extra(tmp_path, monkeypatch, capsys):
    folder = run_folder(tmp_path, METRICS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_runs.main([str(folder), "--out", str(tmp_path / "curves.png")]) == 2
    assert "pip install 'qat[demo]'" in capsys.readouterr().err
