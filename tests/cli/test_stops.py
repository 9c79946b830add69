"""Runs that are told to stop: by a signal, by the time, by the number of steps, by a full disk; and that go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.cli.main import main, run
from qat.data.imagenet import ImageNetDataModule
from qat.training.module import QATModule
from tests.cli.runs import StoppedError, assert_same, assert_same_run, entries, start

KEPT = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")


def at_step(hook: str, step: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, when a hook of the module or the data is called in this step."""
    owner: Any = ImageNetDataModule if hasattr(ImageNetDataModule, hook) else QATModule
    original, done = getattr(owner, hook), []

    def act(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not done and self.trainer.global_step == step:
            done.append(step)
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, hook, act)


def folder_of(runs: Path) -> Path:
    (folder,) = {path.parent for path in runs.glob("*/*/config.yaml")}
    return folder


@pytest.mark.parametrize(
    ("hook", "step", "signum"),
    [
        ("training_step", 0, signal.SIGTERM),
        ("training_step", 9, signal.SIGINT),
        ("validation_step", 8, signal.SIGTERM),  # in the middle of a pass
        ("validation_step", 12, signal.SIGINT),  # at the end of a pass
        ("validation_step", 24, signal.SIGTERM),  # after the last step
    ],
)
def test_a_signal_stops_a_run_that_goes_on_to_the_same_bits(
    hook: str, step: int, signum: signal.Signals, everything: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = ["fit", "--config", str(everything), "--runs", str(tmp_path)]
    with monkeypatch.context() as patch:
        at_step(hook, step, lambda: os.kill(os.getpid(), signum), patch)
        assert main(args) == 128 + signum
    stopped = step if hook == "validation_step" else step + 1  # a step that has begun is finished
    assert capsys.readouterr().err.endswith(
        f"qat: stopped at step {stopped}; go on with --ckpt last --runs {tmp_path}\n"
    )
    assert main([*args, "--ckpt", "last"]) == 0
    assert_same_run(folder_of(tmp_path), whole)


def test_a_signal_before_training_leaves_nothing(
    everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step("calibration_batches", 0, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    assert main(["fit", "--config", str(everything), "--runs", str(tmp_path / "runs")]) == 130
    assert capsys.readouterr().err == "qat: stopped by SIGINT\n"
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_signal_in_an_evaluation(
    whole: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--ckpt", str(whole), "--trainer.accelerator", "cpu"]
    for verb, hook, name in (
        ("validate", "validation_step", "--results_file"),
        ("predict", "predict_step", "--output"),
    ):
        with monkeypatch.context() as patch:
            at_step(hook, 0, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
            assert main([verb, *args, name, str(tmp_path / "out")]) == 143
        assert capsys.readouterr().err.endswith("qat: stopped by SIGTERM\n")
        assert not list(tmp_path.iterdir())


def test_a_run_whose_time_is_over_goes_on_inside_the_pass(
    everything: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", str(everything), "--runs", str(tmp_path)]
    at_step("training_step", 9, lambda: time.sleep(3), monkeypatch)
    assert main([*args, "--trainer.max_time", "00:00:00:03"]) == 0
    assert "trainer.max_time is over: stopped at step" in capsys.readouterr().out
    stopped = torch.load(folder_of(tmp_path) / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < stopped <= 10
    assert main([*args, "--ckpt", "last", "--trainer.max_time", "00:01:00:00"]) == 0  # the time of this start
    assert_same_run(folder_of(tmp_path), whole)


def test_a_run_whose_steps_are_done_goes_on_inside_the_pass(everything: Path, tmp_path: Path) -> None:
    """With a constant rate, because the cosine is planned for all steps."""
    same = ["--model.min_lr", "3e-3", "--model.regularizers", "null"]
    args = ["fit", "--config", str(everything), *same, "--runs"]
    assert main([*args, str(tmp_path / "whole")]) == 0
    assert main([*args, str(tmp_path / "parts"), "--trainer.max_steps", "9"]) == 0
    ours, theirs = folder_of(tmp_path / "parts"), folder_of(tmp_path / "whole")
    assert [row["step"] for row in entries(ours) if "val/loss" in row] == ["3", "7", "8"]  # the last is validated
    assert main([*args, str(tmp_path / "parts"), "--trainer.max_steps", "24", "--ckpt", "last"]) == 0
    contents = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (ours, theirs)]
    for key in KEPT:
        assert_same(*(content[key] for content in contents), key)
    final = [row for row in entries(ours) if row["step"] == "8" and "val/loss" in row]
    assert [row for row in entries(ours) if row not in final] == entries(theirs)


def fail() -> None:
    raise StoppedError


@pytest.mark.parametrize(
    ("options", "step"),
    [(("--trainer.max_steps", "9"), 9), (("--data.crop_epochs", "2", "--trainer.max_steps", "-1"), 6)],
    ids=["steps", "passes"],
)
def test_a_run_that_ends_in_its_final_validation_resumes_with_it(
    options: tuple[str, ...], step: int, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """First it is killed there, then stopped; resumed once more, it validates nothing again."""
    args = ["fit", "--config", str(everything), "--trainer.val_check_interval", "100", *options, "--runs"]
    assert main([*args, str(tmp_path / "whole")]) == 0
    args += [str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        at_step("validation_step", step, fail, patch)
        with pytest.raises(StoppedError):
            run(args)
    ours, theirs = folder_of(tmp_path / "parts"), folder_of(tmp_path / "whole")
    args += ["--ckpt", "last"]
    with monkeypatch.context() as patch:
        at_step("validation_step", step, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert main(args) == 143
    assert f"qat: stopped at step {step}; go on with --ckpt last" in capsys.readouterr().err
    for _ in range(2):
        assert main(args) == 0
        assert_same_run(ours, theirs)
    contents = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (ours, theirs)]
    for key in ("loops", "ImageNetDataModule"):
        assert_same(*(content[key] for content in contents), key)


def test_slurm_starts_a_job_again_that_was_asked_to_leave(
    everything: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"NTASKS": "1", "JOB_ID": "17", "JOB_NAME": "qat", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    args = ["fit", "--config", str(everything), "--runs", str(tmp_path / "runs")]
    with monkeypatch.context() as patch:
        at_step("training_step", 9, lambda: os.kill(os.getpid(), signal.SIGUSR1), patch)
        assert main(args) == 128 + signal.SIGUSR1
    assert "qat: stopped at step 10; go on with --ckpt last" in capsys.readouterr().err
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert main([*args, "--ckpt", "last"]) == 0
    assert_same_run(folder_of(tmp_path / "runs"), whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk is made with mount, which only root may use, and not in every container")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> None:
    """Take all space that is left."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (4096, 1):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError:
                    break


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, before which nothing but the log stands."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("qat: "))
    return line


def test_a_full_disk_loses_nothing(
    everything: Path, whole: Path, images: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = ["fit", "--config", str(everything), "--runs", str(small_disk)]
    with monkeypatch.context() as patch:
        at_step("training_step", 9, lambda: fill(small_disk), patch)
        assert main(args) == 2
    line = only_line(capsys)
    folder = folder_of(small_disk)
    assert f"cannot write {folder}/" in line
    assert "No space left on device" in line
    assert not list(folder.glob("*.part"))
    for verb, option in (("validate", "--results_file"), ("predict", "--output")):
        words = [verb, "--ckpt", str(folder / "last.ckpt"), "--data.root", str(images), "--trainer.accelerator", "cpu"]
        assert main([*words, option, str(small_disk / "out")]) == 2
        assert f"cannot write {small_disk}/out" in only_line(capsys)
    assert {path.name for path in small_disk.iterdir()} == {"all", "filler"}
    (small_disk / "filler").unlink()
    assert main([*args, "--ckpt", "last"]) == 0
    assert_same_run(folder, whole)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert main([*args, "--ckpt", "last"]) == 2
    assert "Read-only file system" in only_line(capsys)


REPEATS = int(os.environ.get("QAT_STOPS", "1"))  # of every case below; by hand 20
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize(
    ("launcher", "options", "signum"),
    [((), (), signal.SIGTERM), ((), TWO, signal.SIGTERM), ((), TWO, signal.SIGINT), (TORCHRUN, TWO, signal.SIGTERM)],
    ids=["one", "two", "two Ctrl-C", "torchrun"],
)
def test_processes_stop_at_any_moment(
    launcher: tuple[str, ...], options: tuple[str, ...], signum: signal.Signals, repeat: int, everything: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A signal to the process that was started, as from a batch system; Ctrl-C goes to all, as from a terminal."""
    rng = random.Random(f"{launcher} {options} {signum} {repeat}")
    args = ["fit", "--config", everything, "--runs", tmp_path, "--data.workers", str(rng.choice((0, 1))), *options]
    process = start(*args, launcher=launcher, start_new_session=True)
    assert process.stderr is not None
    moment = rng.choice(("training starts", "validation at step 4", "validation at step 8"))
    assert any(moment in line for line in iter(process.stderr.readline, ""))
    time.sleep(rng.uniform(0, 0.5))
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    try:
        rest = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stopped = [line for line in rest.splitlines() if line.startswith("qat: stopped at step ")]
    assert len(stopped) == 1, rest
    assert stopped[0].endswith((f"; go on with --ckpt last --runs {tmp_path}", "which was the last one"))
    if launcher:  # torchrun has a traceback of its own
        return
    assert process.returncode == 128 + signum, rest
    assert not [line for line in rest.splitlines() if not line.startswith(("qat: stopped", "validation at step"))]
    if repeat == 0 and options and signum == signal.SIGTERM:  # one process: see the tests above
        (folder,) = tmp_path.glob("*/*")
        process = start("fit", "--ckpt", folder, *options)
        rest = process.communicate(timeout=120)[1]
        assert process.returncode == 0, rest
