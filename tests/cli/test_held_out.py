"""A run that is judged by training images which it does not train on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qat.callbacks import Calibrate
from qat.cli.main import main, run
from qat.data.held_out import put_aside
from qat.data.splits import find_source
from tests.cli.runs import assert_same, entries, run_until
from tests.cli.test_commands import fails


def words(config: Path, ckpt: Path | None, runs: Path, *more: str) -> list[str]:
    taught = ["--model.teacher", "deit_tiny_patch16_224", "--model.teacher_checkpoint", str(ckpt)] if ckpt else []
    return ["fit", "--config", str(config), "--runs", str(runs), "--data.held_out", "6", *taught, *more]


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_best_checkpoint_is_that_with_the_least_distance_to_the_teacher(
    config: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = Path(run(words(config, ckpt, tmp_path, "--model.lr", "0.05")).trainer.default_root_dir)
    found = [float(row["held_out/kl"]) for row in entries(folder) if "held_out/kl" in row]
    assert len(found) == 2  # one validation after each pass
    best = torch.load(only(folder, "best_on_*"), weights_only=True)
    assert best["epoch"] == found.index(min(found))
    assert f"best on held_out/kl {min(found):.4f}: {folder}/best_on_held_out_" in capsys.readouterr().out
    assert f"held_out/kl {found[-1]:.4g}" in caplog.text


def test_without_a_teacher_by_the_loss_on_labels(config: Path, tmp_path: Path) -> None:
    cli = run(words(config, None, tmp_path))
    assert cli.trainer.global_step == 5 + 3  # 18 images: 4 and a half batches of 4, then 2 and a half of 8
    rows = [row for row in entries(Path(cli.trainer.default_root_dir)) if "val/top1" in row]
    assert all({"held_out/loss", "held_out/top1", "val/images"} <= row.keys() for row in rows)
    assert {row["val/images"] for row in rows} == {"12.0"}


def test_a_killed_run_goes_on_to_the_bit(
    config: Path, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(run(words(config, ckpt, tmp_path / "whole")).trainer.default_root_dir)
    args = words(config, ckpt, tmp_path / "part", "--save_every", "2")
    run_until(6, args, monkeypatch)
    part = Path(run([*args, "--ckpt", "last"]).trainer.default_root_dir)
    ours, theirs = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (part, whole))
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert entries(part) == entries(whole)
    assert only(part, "best*").name == only(whole, "best*").name


def test_a_calibration_spares_them(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["calibrate", "--config", str(config), "--runs", str(tmp_path), "--validate", "false"]
    line = fails(capsys, *args, "--data.held_out", "20")
    assert "calibration.images is 8" in line
    assert "has 4, and data.held_out takes 20 more, choose 1..4" in line
    capsys.readouterr()
    assert main([*args, "--data.held_out", "16"]) == 0
    (fit,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: qat fit")]
    assert " --data.held_out 16" in fit


def test_a_training_says_when_its_calibration_has_seen_them(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = ["--config", str(config), "--runs", str(tmp_path)]
    assert main(["calibrate", *runs, "--validate", "false", "--data.held_out", "6"]) == 0
    start = ["--model.quant_checkpoint", str(next(tmp_path.glob("*/*/ptq.ckpt"))), "--trainer.max_steps", "1"]
    run(["fit", *runs, *start, "--data.held_out", "6"])
    assert "may have seen" not in caplog.text
    run(["fit", *runs, *start, "--data.held_out", "9"])
    assert "data.held_out is 9, and the model was calibrated with 6: it may have seen them" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.limit_val_batches", "0.5"], "data.held_out has 2 batches, by all of which"),
        (["--trainer.limit_val_batches", "0"], "trainer.limit_val_batches is 0, and data.held_out has 2 batches"),
        (["--trainer.devices", "13", "--data.val_batch_size", "8"], "data.held_out is 12, and there are 13 processes"),
    ],
)
def test_every_held_out_image_is_used(
    words: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Said before the calibration."""
    monkeypatch.setattr(Calibrate, "setup", lambda *args: pytest.fail("the model was calibrated"))
    args = ["fit", "--config", str(config), "--runs", str(tmp_path), "--data.held_out", "12"]
    assert message in fails(capsys, *args, *words)


def test_held_out_images_that_cannot_be_read_choose_nothing(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    shutil.copytree(images, root)
    source = find_source(root, "train")
    for index in put_aside(24, 2).held_out:
        Path(str(source.path(int(index)))).write_text("<html>")
    args = ["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), "--data.root", str(root)]
    line = fails(capsys, *args, "--data.held_out", "2", "--data.on_bad_image", "skip")
    assert "not a single held-out image could be read, so no checkpoint can be chosen" in line


def test_what_puts_none_aside(config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--config", str(config), "--runs", str(tmp_path)]
    line = fails(capsys, "calibrate", *runs, "--data.images", str(images), "--data.held_out", "4")
    assert "data.held_out is 4: it puts training images aside" in line
    line = fails(capsys, "fit", *runs, "--data.held_out", "24")
    assert "data.held_out is 24, and there are 24 training images" in line
