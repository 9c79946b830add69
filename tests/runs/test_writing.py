"""Files that are complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.errors import QatError
from qat.runs.writing import remove_parts, replacing


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as file:
        file.write("one\n")
        assert not path.exists()
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines(["two\n", None])
    assert path.read_bytes() == b"one\n"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QatError, match=r"cannot write .*file/below"), replacing(tmp_path / "file" / "below"):
        pass


def test_parts_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in ("last.ckpt", "last.ckpt.17.part"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
