"""Files that are complete or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli.check_paths import check_folder
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
    """What a running process writes stays, here that of the parent and our own."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    kept = {"last.ckpt", f"table.csv.{os.getppid()}.part", "other.part"}
    for name in (*kept, f"last.ckpt.{process.pid}.part", f"last.ckpt.{os.getpid()}.part"):
        (tmp_path / name).touch()
    with replacing(tmp_path / "own.csv"):
        remove_parts(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == kept | {f"own.csv.{os.getpid()}.part"}


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    link, file = tmp_path / "link.csv", tmp_path / "below" / "file.csv"
    link.symlink_to(file)
    for text in ("new", "again"):
        with replacing(link) as opened:
            opened.write(text)
        assert link.is_symlink()
        assert file.read_text() == text


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(os.devnull)
    os.mkfifo(pipe)
    for path in (Path(os.devnull), link, pipe, tmp_path):
        with pytest.raises(QatError, match=r"--output .* cannot be written: give the name of a file"):
            check_folder("--output", path)
    check_folder("--output", tmp_path / "new.csv")
