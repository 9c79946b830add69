"""Training on a GPU: where tensors lie, that the loss falls, what resuming restores, and what stops a run."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from qat.callbacks import ConsoleLog
from qat.cli.lightning_cli import QatCLI
from qat.cli.main import main
from tests.conftest import interrupt_at_step
from tests.gpu.callbacks import DeviceRecorder, NoWaits
from tests.gpu.conftest import Fit, all_on_gpu_last_on_cpu, fit_words

TWENTY_STEPS = ["--data.crops_per_image", 8, "--data.crop_epochs", 8, "--trainer.max_steps", 20]  # in one epoch
AVERAGE = "{class_path: WeightAverage, init_args: {decay: 0.9}}"  # configs/add/average.yaml for a short run


def added(folder: Path, *callbacks: str, model: str = "{}") -> list[str]:
    """A further config with these callbacks and options of the model."""
    path = folder / "added.yaml"
    path.write_text(f"trainer: {{callbacks: [{', '.join(callbacks)}]}}\nmodel: {model}\n")
    return ["--config", str(path), "--trust", "true"]  # the classes of these tests


def of_kind(cli: QatCLI, kind: type) -> Any:
    """The one callback of this class."""
    (found,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]
    return found


def losses(folder: Path) -> list[float]:
    """The training loss of every logged step of a run."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@all_on_gpu_last_on_cpu("start", ["calibrated", "float", "quant_checkpoint", "resumed"])
def test_model_average_and_optimizer_lie_on_the_device(start, fit: Fit, config, device, ckpt, tmp_path):
    model = {
        "float": "{recipe: float, w_bits: null, a_bits: null}",
        "quant_checkpoint": f"{{quant_checkpoint: {ckpt}}}",
    }.get(start, "{}")
    words = added(tmp_path, "tests.gpu.callbacks.DeviceRecorder", AVERAGE, model=model)
    if start == "resumed":
        with pytest.raises(RuntimeError, match="stopped"):
            interrupt_at_step(4, fit_words(config, device, tmp_path, *words, "--save_every", 2))
        words += ["--ckpt", "last"]
    found = of_kind(fit(*words), DeviceRecorder).devices
    expected = {kind: {device.type} for kind in ("model", "average", "optimizer", "batch")}
    assert found == expected | {"step": {"cpu"}}  # AdamW reads its count of steps, which on a GPU would be a wait


@all_on_gpu_last_on_cpu("precision", ["32-true", "bf16-mixed"])
def test_the_loss_falls_within_twenty_steps(precision, fit: Fit):
    cli = fit(*TWENTY_STEPS, "--trainer.precision", precision, "--model.lr", 3e-3)
    found = losses(Path(cli.trainer.default_root_dir))
    assert len(found) == 20
    assert mean(found[-5:]) < 0.8 * mean(found[:5])
    state = torch.load(Path(cli.trainer.default_root_dir) / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values())


def test_a_resumed_run_ends_like_the_whole_run(config, device, tmp_path):
    """On a CPU to the bit. On a GPU, kernels that add in a fixed order are asked for, but some operations have none.

    AdamW divides a gradient by its own size, so a gradient that is rounding noise moves its weight by up to the
    learning rate, in either direction. The tolerance is therefore twice the sum of the learning rates after the
    interruption.
    """
    lr, steps = 1e-3, 9
    words = [*added(tmp_path, AVERAGE), "--save_every", 3, "--model.lr", lr, "--trainer.deterministic", "warn"]
    assert main(fit_words(config, device, tmp_path / "whole", *words)) == 0
    with pytest.raises(RuntimeError, match="stopped"):
        interrupt_at_step(4, fit_words(config, device, tmp_path / "parts", *words))
    assert main(fit_words(config, device, tmp_path / "parts", *words, "--ckpt", "last")) == 0
    (whole,), (parts,) = ([*(tmp_path / name).glob("*/*/last.ckpt")] for name in ("whole", "parts"))
    ours, theirs = (torch.load(path, weights_only=True) for path in (parts, whole))
    assert ours["global_step"] == theirs["global_step"] == steps
    tolerance = 2 * lr * (steps - 3) if device.type == "cuda" else 0.0
    for key in ("state_dict", "current_model_state"):
        for name, value in theirs[key].items():
            torch.testing.assert_close(ours[key][name], value, rtol=0, atol=tolerance)
    assert losses(parts.parent)[:3] == pytest.approx(losses(whole.parent)[:3], rel=1e-5 if tolerance else 0)
    assert losses(parts.parent) == pytest.approx(losses(whole.parent), rel=0.05 if tolerance else 0)


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(config, device, tmp_path, capsys):
    words = fit_words(config, device, tmp_path, *TWENTY_STEPS, "--model.lr", 1e30, "--trainer.log_every_n_steps", 10)
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qat: error: ")]
    assert re.search("the loss is (nan|inf) at step", line)
    for path in tmp_path.glob("*/*/last.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


@all_on_gpu_last_on_cpu("more", ["plain", "bf16-mixed", "regularized"])
def test_the_host_does_not_wait_between_two_logs(more, fit: Fit, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ConsoleLog, "on_train_batch_end", lambda *args: None
    )  # it waits every 15 seconds, if it is there
    regularizer = "{class_path: BinRegularizer, init_args: {start: 0.0}}"
    model = f"{{regularizers: [{regularizer}]}}" if more == "regularized" else "{}"
    words = [*added(tmp_path, "tests.gpu.callbacks.NoWaits", model=model), "--trainer.log_every_n_steps", 5]
    cli = fit(*words, *TWENTY_STEPS, "--trainer.precision", "bf16-mixed" if more == "bf16-mixed" else "32-true")
    assert of_kind(cli, NoWaits).watched == [5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18]
    assert len(losses(Path(cli.trainer.default_root_dir))) == 4
