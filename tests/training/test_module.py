"""What a training step logs, and when; what a copy of the module shares with it."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qat.cli import run as command
from qat.errors import QatError
from qat.runs.metrics import MetricsFile
from qat.training import records
from qat.training.module import QATModule
from qat.training.regularizers import BinRegularizer
from tests.training.runs import fit, tiny_module


class Stop(L.Callback):
    """Ends the run after a step, as Lightning's Timer does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.after


def losses(folder: Path) -> dict[int, str]:
    """The logged loss of each step."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return {int(row["step"]): row["train/loss"] for row in rows if row.get("train/loss")}


def run(images: Path, folder: Path, **options: Any) -> dict[int, str]:
    torch.manual_seed(0)
    folder.mkdir()
    module = tiny_module(regularizers=[BinRegularizer(start=0)])
    trainer = fit(module, images, folder, logger=MetricsFile(folder), max_epochs=2, **options)
    assert trainer.global_step
    return losses(folder)


def test_metrics_are_computed_in_logged_steps_only(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, log = [], QATModule.log

    def spy(self: QATModule, *args: Any, **kwargs: Any) -> None:
        seen.append(self.global_step)
        log(self, *args, **kwargs)

    monkeypatch.setattr(QATModule, "log", spy)
    rare = run(images, tmp_path / "rare", log_every_n_steps=4)
    assert set(seen) == {3, 7, 11}
    monkeypatch.undo()
    every = run(images, tmp_path / "every", log_every_n_steps=1)
    assert len(every) == 12
    assert rare == {step: every[step] for step in (3, 7, 11)}


def test_steps_of_several_batches_log_the_last_batch(images: Path, tmp_path: Path) -> None:
    every = run(images, tmp_path / "every", log_every_n_steps=1, accumulate_grad_batches=2)
    rare = run(images, tmp_path / "rare", log_every_n_steps=3, accumulate_grad_batches=2)
    assert len(every) == 6
    assert rare == {step: every[step] for step in (2, 5)}


def test_a_run_that_a_callback_ends_logs_its_last_step(images: Path, tmp_path: Path) -> None:
    every = run(images, tmp_path / "every", log_every_n_steps=1)
    stopped = run(images, tmp_path / "stopped", log_every_n_steps=4, callbacks=[Stop(6)])
    assert stopped == {step: every[step] for step in (3, 5)}


def test_the_entropy_of_labels_is_computed_in_logged_steps_only(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(QATModule, "soft_labels", lambda self, batch: torch.full((len(batch.images), 3), 1 / 3))
    monkeypatch.setattr(records, "entropy", lambda labels, classes: calls.append(1) or torch.tensor(1.0))
    fit(tiny_module(), images, tmp_path, logger=MetricsFile(tmp_path), max_epochs=1, log_every_n_steps=3)
    assert len(calls) == 2
    assert {"train/kl", "train/label_entropy"} <= set((tmp_path / "metrics.csv").read_text().split("\n")[0].split(","))


def test_a_copy_regularizes_its_own_weights() -> None:
    """A weight average is a deep copy of the module."""
    module = tiny_module(regularizers=[BinRegularizer()])
    twin = copy.deepcopy(module)
    theirs = dict(twin.model.named_modules())
    sites = twin.penalties.sites["bin_regularizer"]
    assert [site.name for site in sites] == [site.name for site in module.penalties.sites["bin_regularizer"]]
    for site in sites:
        assert site.quantizer is theirs[site.name]
        assert any(site.weight is parameter for parameter in twin.model.parameters())
    shared = {id(p) for p in module.parameters()} & {id(p) for p in twin.parameters()}
    assert not shared


def test_two_modules_with_the_same_options_regularize_their_own_weights() -> None:
    regularizer = BinRegularizer()
    first, second = (tiny_module(regularizers=[regularizer]) for _ in range(2))
    for module in (first, second):
        own = {id(parameter) for parameter in module.parameters()}
        assert {id(site.weight) for site in module.penalties.sites["bin_regularizer"]} <= own


def test_steps_stay_positive(images: Path, tmp_path: Path) -> None:
    module = tiny_module(step_lr=0.5)  # AdamW moves every step by 0.5 at once
    fit(module, images, tmp_path, max_steps=3)
    steps = [value for name, value in module.model.named_parameters() if name.endswith(".step")]
    assert steps
    assert all((step > 0).all() for step in steps)
    assert any((step <= 1e-6).any() for step in steps)  # some of them were projected


def test_weights_that_are_not_finite_are_not_saved(images: Path, tmp_path: Path) -> None:
    module = tiny_module()
    trainer = fit(module, images, tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    with torch.no_grad():
        module.model.head.weight[1, 2] = torch.inf
    with pytest.raises(QatError, match=r"head\.weight is not finite at step 1"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def logged(folder: Path) -> dict[str, str]:
    """The loss of each logged step."""
    (file,) = folder.glob("*/*/metrics.csv")
    with file.open() as rows:
        return {row["step"]: row["train/loss"] for row in csv.DictReader(rows) if row["train/loss"]}


def test_steps_after_an_early_stop_that_has_to_wait_have_their_own_metrics(config: Path, tmp_path: Path) -> None:
    """The stop is asked for in the validation of step 3, and min_steps delays it."""
    common = ["fit", "--config", str(config), "--trainer.log_every_n_steps", "2", "--trainer.val_check_interval", "3"]
    stop = ["EarlyStopping", "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.stopping_threshold", "100"]
    command([*common, "--runs", str(tmp_path / "whole")])
    command([*common, "--runs", str(tmp_path / "early"), "--trainer.min_steps", "8", "--trainer.callbacks+", *stop])
    whole, early = logged(tmp_path / "whole"), logged(tmp_path / "early")
    assert {"1", "3", "5", "7"} <= early.keys()
    assert all(early[step] == whole[step] for step in early.keys() & whole.keys())


def test_a_callback_may_monitor_the_training_loss(config: Path, tmp_path: Path) -> None:
    words = ["--trainer.log_every_n_steps", "50", "--trainer.callbacks+", "EarlyStopping"]
    words += ["--trainer.callbacks.monitor", "train/loss"]
    cli = command(["fit", "--config", str(config), "--runs", str(tmp_path), *words])
    assert cli.trainer.global_step == 9
