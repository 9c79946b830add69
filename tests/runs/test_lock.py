"""One run folder, one writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.errors import QatError
from qat.runs.lock import FolderLock

OTHER = """
import os, sys, time
from pathlib import Path
from qat.runs.lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)  # as the worker of a loader, which a killed process leaves behind
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of this kind")
def test_a_lock_ends_with_its_process_and_not_with_its_children(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(QatError, match=f"is being written by process {other.pid} on "):
            FolderLock(tmp_path)
        other.kill()
        other.wait()
        FolderLock(tmp_path).release()
        os.killpg(other.pid, 9)  # the child


def test_a_lock_can_be_had_again_once_it_was_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(QatError, match="is being written"):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


def test_the_owner_is_named_where_a_file_has_no_pwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite", raising=False)  # as on Windows
    (tmp_path / "run.lock").write_text("the owner before, with a long name")
    lock = FolderLock(tmp_path)
    assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()


def test_an_unused_folder_is_removed(tmp_path: Path) -> None:
    for name, used in (("empty", False), ("used", True)):
        folder = tmp_path / name / "date"
        folder.mkdir(parents=True)
        lock = FolderLock(folder)
        if used:
            (folder / "ptq.ckpt").touch()
        lock.release(unused=True)
        assert folder.exists() is used
        assert folder.parent.exists() is used
