"""The digits tree: how many images, where, with which pixels, and what an interruption leaves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

TOOL = Path(__file__).parents[2] / "tools" / "digits.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = load_tool()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "deep" / "digits"
    digits.write(folder)
    return folder


def refuse_images(tree: Path) -> None:
    raise AssertionError("nothing may be written")


def test_the_split_has_1437_and_360_images_in_ten_class_folders(tree):
    for split, count in {"train": 1437, "val": 360}.items():
        assert sorted(p.name for p in (tree / split).iterdir()) == [str(d) for d in range(10)]
        assert len(list((tree / split).glob("*/*.png"))) == count


def test_every_image_is_there_once_under_its_own_digit(tree):
    found = {int(p.stem): int(p.parent.name) for p in tree.glob("*/*/*.png")}
    assert found == dict(enumerate(load_digits().target.tolist()))


def test_every_digit_has_its_share_in_val(tree):
    share = np.bincount(load_digits().target) * 360 / 1797
    counts = np.array([len(list((tree / "val" / str(d)).iterdir())) for d in range(10)])
    assert (np.abs(counts - share) < 1).all()


def test_grey_values_0_to_16_become_0_to_255(tree):
    (path,) = tree.glob("*/0/0000.png")
    image = Image.open(path)
    assert (image.mode, image.size) == ("L", (8, 8))
    # first row of the first digit: 0 0 5 13 9 1 0 0, times 255/16
    assert np.asarray(image)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert np.asarray(image).max() <= 255 * 15 / 16 + 1  # its largest value is 15


def test_the_same_tree_is_written_every_time(tree, tmp_path):
    digits.write(tmp_path / "again")
    assert {p.relative_to(tree) for p in tree.rglob("*")} == {
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*")
    }


def test_a_complete_tree_is_left_alone(tree, monkeypatch):
    monkeypatch.setattr(digits, "write_images", refuse_images)
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    digits.write(tree)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(tree: Path) -> None:
        (tree / "train" / "0").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, "write_images", interrupt)
        with pytest.raises(KeyboardInterrupt):
            digits.write(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(digits, "write_images", refuse_images)
    with pytest.raises(ValueError, match="not a finished digits folder"):
        digits.write(tmp_path)


def test_an_empty_folder_is_filled_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "write_images", lambda tree: (tree / "train").mkdir(parents=True))
    digits.main([str(tmp_path)])
    assert (tmp_path / "train").is_dir()
    assert digits.is_complete(tmp_path)


def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert digits.main([str(tmp_path / "file")]) == 2
    assert "exists and is not a finished digits folder" in capsys.readouterr().err
    assert digits.main([str(tmp_path / "file" / "digits")]) == 2
    assert "error: [Errno " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert digits.main([str(tmp_path / "digits")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("digits: error: ")
    assert "pip install 'qat[demo]'" in line
