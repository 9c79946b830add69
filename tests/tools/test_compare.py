"""The comparison of predictions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from qat.errors import QatError

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


def test_other_images_and_other_files_are_refused(tmp_path):
    a = write(tmp_path / "a.csv", {"ant/0.png": "ant"})
    b = write(tmp_path / "b.csv", {"ant/1.png": "ant"})
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    with pytest.raises(QatError, match="other images"):
        compare.compare([a, b])
    with pytest.raises(QatError, match="qat predict"):
        compare.compare([tmp_path / "c.csv"])
