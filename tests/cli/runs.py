"""What tests of stopped and resumed runs share: processes of their own, and whether two runs are equal to the bit."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.cli.main import run
from qat.training.module import QATModule

ROOT = Path(__file__).parents[2]
SCORES = ("current_score", "best_model_score")  # of the checkpoint that is best on the validation images


def start(*args: object, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
    """`qat` in a process of its own, with as many threads as here: sums depend on their number."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *launcher, "-m", "qat", *map(str, args)]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(words, env=env, text=True, **pipes, **options)


def entries(folder: Path) -> list[dict[str, str]]:
    """metrics.csv, without empty cells and whatever the order of its columns."""
    with (folder / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same(ours: Any, theirs: Any, place: str = "") -> None:
    """Equal to the bit, all the way down."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{place}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), place
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{place}/{i}")
    else:
        assert ours == theirs, place


def assert_same_run(folder: Path, whole: Path) -> None:
    """Weights, steps, average, optimizer, tracker and metrics of two runs are equal to the bit."""
    ours, theirs = (torch.load(f / "last.ckpt", weights_only=True) for f in (folder, whole))
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers",
                "global_step", "epoch"):  # fmt: skip
        assert_same(ours[key], theirs[key], key)
    trackers = [next(v for k, v in c["callbacks"].items() if "OscillationTracker" in k) for c in (ours, theirs)]
    assert_same(*trackers, "tracker")
    ours, theirs = (
        {name: state[name] for state in content["callbacks"].values() for name in SCORES if name in state}
        for content in (ours, theirs)
    )
    assert_same(ours, theirs, "scores")
    assert entries(folder) == entries(whole)
    assert (folder / "oscillation.csv").read_text() == (whole / "oscillation.csv").read_text()
    assert {p.name for p in folder.glob("best*")} == {p.name for p in whole.glob("best*")}
    assert not list(folder.glob("*.part"))


class StoppedError(Exception):
    """Raised in place of whatever else may end a process."""


def run_until(step: int, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle of this step."""

    def stop(module: QATModule, *args: object) -> None:
        if module.global_step == step:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(QATModule, "on_before_zero_grad", stop)
        with pytest.raises(StoppedError):
            run(args)
