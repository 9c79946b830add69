"""The demo runs from end to end: every command, every file, in its own folder and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "demo.py"
RUNS = ("float", "w4a4", "w2a2")
RESULTS = ("float", "w4a4_calibrated", "w4a4", "w2a2_calibrated", "w2a2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the demo was started in, and what it printed; a process of its own, as a user runs it."""
    folder = tmp_path_factory.mktemp("demo")
    path = os.pathsep.join([str(TOOL.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, str(TOOL), "--quick", "--out", "out"],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done.stdout


def test_everything_lands_in_the_output_folder(finished):
    folder, _ = finished
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert {path.name for path in (folder / "out").iterdir()} == {"data", "runs", *(f"{r}.json" for r in RESULTS)}


def test_every_training_leaves_a_checkpoint(finished):
    folder, _ = finished
    for run in RUNS:
        assert len(list((folder / "out" / "runs" / run).glob("*/last.ckpt"))) == 1


def test_every_evaluation_sees_all_validation_images(finished):
    folder, _ = finished
    for name in RESULTS:
        assert json.loads((folder / "out" / f"{name}.json").read_text())["images"] == 360


def test_each_command_is_printed_once_before_it_runs(finished):
    _, printed = finished
    commands = [line.removeprefix("$ ").split() for line in printed.splitlines() if line.startswith("$ qat ")]
    fit, validate = ["qat", "fit"], ["qat", "validate"]
    assert [words[:2] for words in commands] == [fit, validate, *[validate, fit, validate] * 2]
    from_checkpoint = [words for words in commands if "--ckpt" in words]
    assert len(from_checkpoint) == len(RUNS)
    assert all("--config" not in words for words in from_checkpoint)


def test_the_table_has_a_line_for_every_model(finished):
    _, printed = finished
    table = printed[printed.index("== Result") :]
    for model in ("float", "W4A4 calibrated", "W4A4 trained", "W2A2 calibrated", "W2A2 trained"):
        assert model in table
