"""Runs that are killed and resumed, or resumed with other settings."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.cli.main import main, run
from qat.training.module import QATModule
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
KILLED = -9 if os.name == "posix" else 1  # exit code


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run with everything that has a state: average, tracker, drop path, accumulation, validations within a pass."""
    path = tmp_path_factory.mktemp("config") / "all.yaml"
    path.write_text(
        f"""
save_every: 2
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 24
  log_every_n_steps: 1
  accumulate_grad_batches: 2
  check_val_every_n_epoch: null
  val_check_interval: 8
  callbacks:
    - {{class_path: EMAWeightAveraging, init_args: {{decay: 0.9}}}}
    - {{class_path: OscillationTracker, init_args: {{log_every: 3}}}}
    - {{class_path: GradientRatio, init_args: {{every: 4}}}}
model:
  arch: deit_tiny_patch16_224
  model_args: {TINY}
  checkpoint: null
  drop_path: 0.3
  recipe: vvtq
  w_bits: 2
  a_bits: 3
  lr: 3.0e-3
  regularizers: [{{class_path: BinRegularizer, init_args: {{start: 0.1}}}}]
data: {{root: {images}, batch_size: 4, crops_per_image: 2, crop_epochs: 8, workers: 0}}
calibration: {{images: 8, batch_size: 4}}
"""
    )
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the uninterrupted run: 4 passes of 12 batches, 24 optimizer steps."""
    cli = run(["fit", "--config", str(config), "--runs", str(tmp_path_factory.mktemp("whole"))])
    assert cli.trainer.global_step == 24
    return Path(cli.trainer.default_root_dir)


def start(*args: object) -> subprocess.Popen[str]:
    """`qat` in a process of its own, with as many threads as here: sums depend on their number."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "qat", *map(str, args)]
    return subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)


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
    assert entries(folder) == entries(whole)
    assert (folder / "oscillation.csv").read_text() == (whole / "oscillation.csv").read_text()
    assert {p.name for p in folder.glob("best*")} == {p.name for p in whole.glob("best*")}
    assert not list(folder.glob("*.part"))


def test_a_run_that_was_killed_ends_like_one_that_was_not(config: Path, whole: Path, tmp_path: Path) -> None:
    rng, kills, resumed = random.Random(0), 0, []
    args = ["fit", "--config", config, "--runs", tmp_path]
    for _ in range(12):
        process = start(*args, *resumed)
        assert process.stderr is not None
        progress = (
            line for line in iter(process.stderr.readline, "") if "training starts" in line or "validation" in line
        )
        began = list(islice(progress, rng.randint(1, 2)))  # of seven lines: the start, and a validation every 4 steps
        if began and kills < 4:
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            kills += process.wait() != 0
        rest = process.communicate()[1]
        if process.returncode == 0:
            break
        assert process.returncode == KILLED, rest
        resumed = ["--ckpt", "last"] if list(tmp_path.glob("*/*/last.ckpt")) else []
    assert process.returncode == 0
    assert kills >= 2
    folder = sorted(tmp_path.glob("*/*/last.ckpt"))[-1].parent
    assert_same_run(folder, whole)
    assert (folder / "config_2.yaml").is_file()


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


@pytest.mark.parametrize("step", [3, 5, 9, 12, 13, 19])
def test_a_run_resumes_from_any_step(
    step: int, config: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint was written between two batches, after a validation, or at the end of a pass."""
    args = ["fit", "--config", str(config), "--runs", str(tmp_path)]
    run_until(step, args, monkeypatch)
    cli = run([*args, "--ckpt", "last"])
    assert_same_run(Path(cli.trainer.default_root_dir), whole)


class TestOtherSettings:
    def test_a_longer_run_with_another_learning_rate_says_so(
        self, config: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        args = ["fit", "--config", str(config), "--runs", str(tmp_path), "--ckpt", str(whole / "last.ckpt")]
        with caplog.at_level("INFO"):
            cli = run([*args, "--data.crop_epochs", "12", "--model.lr", "1e-3", "--trainer.max_steps", "-1"])
        assert cli.trainer.global_step == 36
        assert "model.lr 0.003 -> 0.001" in caplog.text
        assert "data.crop_epochs 8 -> 12" in caplog.text
        assert "at step 24" in caplog.text
        rates = [float(row["lr"]) for row in entries(Path(cli.trainer.default_root_dir)) if "lr" in row]
        assert max(rates) < 1e-3  # the cosine of 36 steps, from its 24th

    def test_the_same_settings_say_nothing(
        self, config: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        args = ["fit", "--config", str(config), "--runs", str(tmp_path), "--ckpt", str(whole / "last.ckpt")]
        with caplog.at_level("INFO"):
            run(args)
        assert "other than in the checkpoint" not in caplog.text
        assert "nothing was left to train" in caplog.text

    def test_options_that_the_card_settles_are_not_compared(self, whole: Path) -> None:
        options = torch.load(whole / "last.ckpt", weights_only=True)["qat"]["options"]
        assert {"model.lr", "model.regularizers", "data.batch_size", "trainer.callbacks"} <= options.keys()
        assert not {f"model.{key}" for key in ("arch", "model_args", "preprocessing", "w_bits")} & options.keys()
        assert not {"data.root", "data.preprocessing", "data.workers"} & options.keys()

    def test_another_batch_in_the_middle_of_a_pass_is_refused(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = ["fit", "--config", str(config), "--runs", str(tmp_path)]
        run_until(9, args, monkeypatch)  # in the second pass
        assert main([*args, "--ckpt", "last", "--data.batch_size", "8"]) == 2
        assert "batch_size is 8" in capsys.readouterr().err

    @pytest.mark.parametrize(("option", "value"), [("--data.seed", "5"), ("--data.crops_per_image", "4")])
    def test_another_order_in_the_middle_of_a_pass_is_refused(
        self, option: str, value: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        args = ["fit", "--config", str(config), "--runs", str(tmp_path)]
        run_until(9, args, monkeypatch)
        assert main([*args, "--ckpt", "last", option, value]) == 2
        assert "middle of a pass" in capsys.readouterr().err

    def test_a_run_with_an_average_needs_it_to_resume(
        self, config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ["fit", "--config", str(config), "--runs", str(tmp_path), "--trainer.callbacks", "null"]
        assert main([*args, "--ckpt", str(whole / "last.ckpt")]) == 2
        assert "weight average" in capsys.readouterr().err

    def test_a_refused_command_is_not_the_last_run(
        self, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = ["fit", "--config", str(config), "--runs", str(tmp_path)]
        run_until(9, args, monkeypatch)
        assert main([*args, "--save_every", "0"]) == 2
        assert main([*args, "--trainer.accelerator", "gpu"]) == 2
        assert run([*args, "--ckpt", "last"]).trainer.global_step == 24

    def test_there_is_no_run_to_resume(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["fit", "--config", str(config), "--runs", str(tmp_path), "--ckpt", "last"]) == 2
        assert "no " in capsys.readouterr().err


def test_freezing_resumes_to_the_bit(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freezing = "[{class_path: IterativeFreezing, init_args: {freeze_above: 0.02, momentum: 0.1}}]"
    args = ["fit", "--config", str(config), "--trainer.callbacks", freezing, "--model.step_lr", "1e-4"]
    args += ["--data.workers", "1"]
    cli = run([*args, "--runs", str(tmp_path / "whole")])
    run_until(15, [*args, "--runs", str(tmp_path / "parts")], monkeypatch)
    resumed = run([*args, "--runs", str(tmp_path / "parts"), "--ckpt", "last"])
    folders = [Path(c.trainer.default_root_dir) for c in (resumed, cli)]
    ours, theirs = (torch.load(folder / "last.ckpt", weights_only=True) for folder in folders)
    for key in ("state_dict", "optimizer_states"):
        assert_same(ours[key], theirs[key], key)
    assert_same(ours["callbacks"]["IterativeFreezing"], theirs["callbacks"]["IterativeFreezing"])
    assert any(bool(state["frozen"].any()) for state in ours["callbacks"]["IterativeFreezing"]["states"].values())


def test_freezing_and_an_average_are_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", str(config), "--runs", str(tmp_path), "--trainer.callbacks+", "IterativeFreezing"]
    assert main(args) == 2
    assert "do not go together" in capsys.readouterr().err


def test_the_checkpoint_describes_the_average(config: Path, whole: Path, images: Path, tmp_path: Path) -> None:
    content = torch.load(whole / "last.ckpt", weights_only=True)
    differ = [
        name
        for name, value in content["state_dict"].items()
        if not torch.equal(value, content["current_model_state"][name])
    ]
    assert differ
    cli = run(["validate", "--ckpt", str(whole / "last.ckpt"), "--data.root", str(images), "--data.workers", "0"])
    assert_same(cli.model.state_dict(), content["state_dict"])
    rows = [row for row in entries(whole) if "val/loss" in row]
    assert float(rows[-1]["val/loss"]) == pytest.approx(float(cli.trainer.callback_metrics["val/loss"]), rel=1e-6)
