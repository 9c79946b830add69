"""Predictions compared: hits, intervals, the table, and files that are no predictions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("compare", Path(__file__).parents[2] / "tools/compare.py")
assert spec is not None
assert spec.loader is not None
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)


def write(path: Path, guesses: dict[str, str]) -> Path:
    path.write_text("path,class_1,prob_1\n" + "".join(f"{image},{guess},0.5\n" for image, guess in guesses.items()))
    return path


def test_the_folder_of_an_image_is_its_class(tmp_path):
    path = write(tmp_path / "a.csv", {"ant/0.png": "ant", "bee/0.png": "ant"})
    assert compare.hits(path) == {"ant/0.png": True, "bee/0.png": False}


def test_interval_by_hand():
    mean, half = compare.interval(np.array([1.0, 0.0, 0.0, -1.0, 1.0]))
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(1.96 * 0.8366600265 / 5**0.5)  # squared deviations sum to 2.8, over 4


def test_the_interval_of_a_single_image_is_infinite():
    assert compare.interval(np.array([1.0])) == (1.0, float("inf"))


def test_the_table_pairs_every_file_with_the_first(tmp_path, capsys):
    float_ = write(tmp_path / "float.csv", {f"ant/{i}.png": "ant" for i in range(4)})
    quantized = write(tmp_path / "w4a4.csv", {f"ant/{i}.png": "ant" if i else "bee" for i in range(4)})
    compare.main([str(float_), str(quantized)])
    lines = capsys.readouterr().out.splitlines()
    assert any("float" in line and "100.0 +- 0.0" in line and "+0.0 +- 0.0" in line for line in lines)
    # three of four are right: the deviation is 50 points, and half an interval 1.96 * 50 / 2
    assert any("w4a4" in line and "75.0 +- 49.0" in line and "-25.0 +- 49.0" in line for line in lines)


def test_files_that_cannot_be_compared_end_in_one_line(tmp_path, capsys):
    a = write(tmp_path / "a.csv", {"ant/0.png": "ant"})
    other = write(tmp_path / "b.csv", {"ant/1.png": "ant"})
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00path")
    (tmp_path / "short.csv").write_text("path,class_1\nant/0.png\n")
    (tmp_path / "twice.csv").write_text("path,class_1\nant/0.png,ant\nant/0.png,bee\n")
    no_rows = write(tmp_path / "no_rows.csv", {})
    for path, message in (
        (other, "has other images than"),
        (tmp_path / "c.csv", "no columns path and class_1"),
        (tmp_path / "empty.csv", "no columns path and class_1"),
        (tmp_path / "binary.csv", "cannot read"),
        (no_rows, "holds no predictions"),
        (tmp_path / "short.csv", "has a line without path or class: 'ant/0.png'"),
        (tmp_path / "twice.csv", "has 'ant/0.png' twice"),
        (tmp_path / "missing.csv", "cannot read"),
        (tmp_path, "cannot read"),
    ):
        assert compare.main([str(a), str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("compare: error: ")
        assert message in line
    assert compare.main([]) == 2
    assert "the following arguments are required: predictions" in capsys.readouterr().err
