"""What a progress bar and a log file show between two logs."""

from __future__ import annotations

import csv
import re
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qat.callbacks import ConsoleLog, ProgressBar
from qat.runs.metrics import MetricsFile
from tests.training.runs import fit, tiny_module


class Watch(L.Callback):
    """The numbers of the progress bar after every step."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.seen.append(self.bar.get_metrics(trainer, pl_module))


def logged(folder: Path) -> list[dict[str, str]]:
    return [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["train/loss"]]


def test_the_bar_shows_plain_numbers_of_the_last_log(images: Path, tmp_path: Path) -> None:
    bar = ProgressBar()
    watch = Watch(bar)
    options = {"logger": MetricsFile(tmp_path), "enable_progress_bar": True, "log_every_n_steps": 2}
    fit(tiny_module(), images, tmp_path, [watch, bar], max_steps=5, **options)
    rows = [{name: float(row[name]) for name in ("train/loss", "lr", "step_lr")} for row in logged(tmp_path)]
    ends = [seen.pop("left") for seen in watch.seen]
    shown = watch.seen
    assert shown == [{}, rows[0], rows[0], rows[1], rows[1]]
    assert ends[-1] == "0:00:00"  # all 5 steps are done
    assert all(end.count(":") == 2 for end in ends)
    assert all(type(value) is float for seen in shown for value in seen.values())


def test_nothing_is_fetched_between_two_logs(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the step, the bar or the log file, nor by Lightning, which fetches in every step what its bar shows."""
    fetched: list[int] = []
    module = tiny_module()

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor) -> Any:
            files = {frame.filename for frame in traceback.extract_stack(limit=40)}
            elsewhere = ("torch/optim/", "torch/utils/data/", "pytorch/utilities/data.py")  # on the CPU in any case
            if not any(part in file for file in files for part in elsewhere) and module.project is not None:
                fetched.append(module.global_step)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, spy)

    for name in ("item", "tolist", "__float__", "__bool__"):
        watch(name)
    monkeypatch.setattr(module.finite, "check", lambda loss, place: None)  # reads on a CPU
    options = {"logger": MetricsFile(tmp_path), "enable_progress_bar": True, "log_every_n_steps": 4}
    fit(module, images, tmp_path, [ProgressBar(), ConsoleLog(seconds=0)], max_steps=7, **options)
    assert set(fetched) == {4}  # after the fourth step, which is logged


def test_the_log_file_has_the_loss_of_the_last_log(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="qat"):
        fit(tiny_module(), images, tmp_path, [ConsoleLog(seconds=0)],
            logger=MetricsFile(tmp_path), max_steps=3, log_every_n_steps=2)  # fmt: skip
    (row,) = logged(tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    loss = f"train/loss {float(row['train/loss']):.4g}"
    lines = [re.sub(r"\d:\d\d:\d\d", "TIME", line) for line in lines]
    assert lines == [
        "step 1 of 3 (pass 1, batch 1 of 6), TIME left: ",
        f"step 2 of 3 (pass 1, batch 2 of 6), TIME left: {loss}",
        f"step 3 of 3 (pass 1, batch 3 of 6), TIME left: {loss}",
    ]
