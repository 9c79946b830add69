"""Run folders, and which checkpoint ``--ckpt`` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.errors import QatError
from qat.runs.folder import config_name, find_checkpoint, last_checkpoint, newest_config, parent_of_runs


def test_the_newest_run_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(QatError, match="no run in"):
        last_checkpoint(tmp_path, "a")
    for run in (
        "a/2026-01-01_00-00-00",
        "a/2026-02-01_00-00-00-9",
        "a/2026-02-01_00-00-00-10",
        "b/2026-02-02_00-00-00",
    ):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "last.ckpt").touch()
        (tmp_path / run / "config.yaml").touch()
    (tmp_path / "a/2026-03-01_00-00-00").mkdir()  # refused before it began
    assert last_checkpoint(tmp_path, "a") == tmp_path / "a/2026-02-01_00-00-00-10/last.ckpt"
    assert last_checkpoint(tmp_path) == tmp_path / "b/2026-02-02_00-00-00/last.ckpt"
    newest = tmp_path / "a/2026-03-01_00-00-00"
    (newest / "config.yaml").touch()
    with pytest.raises(QatError, match=r"2026-03-01_00-00-00, ended before its first last\.ckpt; leave --ckpt out"):
        last_checkpoint(tmp_path)
    (newest / "units").mkdir()
    (newest / "units/unit_000.pt").touch()
    with pytest.raises(QatError, match=r"it was calibrating: --resume .*2026-03-01_00-00-00 in place of --ckpt"):
        last_checkpoint(tmp_path)
    (newest / "units/unit_000.pt").unlink()
    (newest / "ptq.ckpt").touch()
    assert last_checkpoint(tmp_path) == newest / "ptq.ckpt"
    with pytest.raises(QatError, match=r"its calibration is there: give .*ptq\.ckpt as --model\.quant_checkpoint"):
        last_checkpoint(tmp_path, trains=True)


def test_configs_are_numbered(tmp_path: Path) -> None:
    for name in ("config.yaml", "config_2.yaml", "config_3.yaml"):
        assert config_name(tmp_path) == name
        (tmp_path / name).touch()


def test_the_newest_config_has_the_highest_number(tmp_path: Path) -> None:
    assert newest_config(tmp_path) is None
    for n in range(1, 12):
        name = "config.yaml" if n == 1 else f"config_{n}.yaml"
        (tmp_path / name).touch()
        assert newest_config(tmp_path) == tmp_path / name


def test_ckpt_is_a_file_a_folder_or_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    with pytest.raises(QatError, match=r"has no last\.ckpt"):
        find_checkpoint(folder, tmp_path, None)
    (folder / "ptq.ckpt").touch()
    assert find_checkpoint(folder, tmp_path, None) == folder / "ptq.ckpt"
    (folder / "last.ckpt").touch()
    for word in (folder, folder / "last.ckpt", Path("last")):
        assert find_checkpoint(word, tmp_path, None) == folder / "last.ckpt"


@pytest.mark.parametrize("name", ["", "..", "/tmp/elsewhere", "a/../../b"])
def test_a_name_does_not_lead_out_of_the_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(QatError, match="--name"):
        parent_of_runs(tmp_path, name)
