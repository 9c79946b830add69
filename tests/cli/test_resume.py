"""Runs that are killed and resumed, or resumed with other settings."""

from __future__ import annotations

import os
import random
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from qat.cli.main import main, run
from tests.cli.runs import assert_same, assert_same_run, entries, run_until, start

KILLED = -9 if os.name == "posix" else 1  # exit code


def test_a_run_that_was_killed_ends_like_one_that_was_not(everything: Path, whole: Path, tmp_path: Path) -> None:
    rng, kills, resumed = random.Random(0), 0, []
    args = ["fit", "--config", everything, "--runs", tmp_path]
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


@pytest.mark.parametrize("step", [3, 5, 9, 12, 13, 19])
def test_a_run_resumes_from_any_step(
    step: int, everything: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint was written between two batches, after a validation, or at the end of a pass."""
    args = ["fit", "--config", str(everything), "--runs", str(tmp_path)]
    run_until(step, args, monkeypatch)
    cli = run([*args, "--ckpt", "last"])
    assert_same_run(Path(cli.trainer.default_root_dir), whole)


class TestOtherSettings:
    def test_a_longer_run_with_another_learning_rate_says_so(
        self, everything: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        args = ["fit", "--config", str(everything), "--runs", str(tmp_path), "--ckpt", str(whole / "last.ckpt")]
        with caplog.at_level("INFO"):
            cli = run([*args, "--data.crop_epochs", "12", "--model.lr", "1e-3", "--trainer.max_steps", "-1"])
        assert cli.trainer.global_step == 36
        assert "model.lr 0.003 -> 0.001" in caplog.text
        assert "data.crop_epochs 8 -> 12" in caplog.text
        assert "at step 24" in caplog.text
        rates = [float(row["lr"]) for row in entries(Path(cli.trainer.default_root_dir)) if "lr" in row]
        assert max(rates) < 1e-3  # the cosine of 36 steps, from its 24th

    def test_the_same_settings_say_nothing(
        self, everything: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        args = ["fit", "--config", str(everything), "--runs", str(tmp_path), "--ckpt", str(whole / "last.ckpt")]
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
        self, everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = ["fit", "--config", str(everything), "--runs", str(tmp_path)]
        run_until(9, args, monkeypatch)  # in the second pass
        assert main([*args, "--ckpt", "last", "--data.batch_size", "8"]) == 2
        assert "batch_size is 8" in capsys.readouterr().err

    def test_another_order_in_the_middle_of_a_pass_is_refused(
        self, everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = ["fit", "--config", str(everything), "--runs", str(tmp_path)]
        run_until(9, args, monkeypatch)
        assert main([*args, "--ckpt", "last", "--data.seed", "5"]) == 2
        assert "middle of a pass" in capsys.readouterr().err

    def test_a_run_with_an_average_needs_it_to_resume(
        self, everything: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ["fit", "--config", str(everything), "--runs", str(tmp_path), "--trainer.callbacks", "null"]
        assert main([*args, "--ckpt", str(whole / "last.ckpt")]) == 2
        assert "weight average" in capsys.readouterr().err

    def test_a_refused_command_is_not_the_last_run(
        self, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = ["fit", "--config", str(everything), "--runs", str(tmp_path)]
        run_until(9, args, monkeypatch)
        assert main([*args, "--save_every", "0"]) == 2
        assert main([*args, "--trainer.accelerator", "gpu"]) == 2
        assert run([*args, "--ckpt", "last"]).trainer.global_step == 24

    def test_there_is_no_run_to_resume(
        self, everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["fit", "--config", str(everything), "--runs", str(tmp_path), "--ckpt", "last"]) == 2
        assert "no " in capsys.readouterr().err


FREEZING = "[{class_path: IterativeFreezing, init_args: {freeze_above: 0.02, momentum: 0.1}}]"
HOLDING = "[{class_path: FrozenCodes, init_args: {share: 0.8}}]"


@pytest.mark.parametrize("callbacks", [FREEZING, HOLDING])
def test_weights_that_are_frozen_resume_to_the_bit(
    callbacks: str, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", "--config", str(everything), "--trainer.callbacks", callbacks, "--model.step_lr", "1e-4"]
    args += ["--data.workers", "1"]
    cli = run([*args, "--runs", str(tmp_path / "whole")])
    run_until(15, [*args, "--runs", str(tmp_path / "parts")], monkeypatch)
    resumed = run([*args, "--runs", str(tmp_path / "parts"), "--ckpt", "last"])
    folders = [Path(c.trainer.default_root_dir) for c in (resumed, cli)]
    ours, theirs = (torch.load(folder / "last.ckpt", weights_only=True) for folder in folders)
    for key in ("state_dict", "optimizer_states"):
        assert_same(ours[key], theirs[key], key)
    name = "IterativeFreezing" if callbacks == FREEZING else "FrozenCodes"
    assert_same(ours["callbacks"][name], theirs["callbacks"][name])
    if callbacks == FREEZING:
        assert any(bool(state["frozen"].any()) for state in ours["callbacks"][name]["states"].values())
    else:
        assert ours["callbacks"][name] == {"released": True}


def test_freezing_and_an_average_are_refused(
    everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", str(everything), "--runs", str(tmp_path), "--trainer.callbacks+", "IterativeFreezing"]
    assert main(args) == 2
    assert "do not go together" in capsys.readouterr().err


def test_the_checkpoint_describes_the_average(everything: Path, whole: Path, images: Path, tmp_path: Path) -> None:
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
