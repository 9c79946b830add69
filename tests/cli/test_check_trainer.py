"""Settings of the trainer that are refused by name, before anything is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qat.cli.check_trainer import check_lengths, check_trainer, further_metrics
from qat.cli.lightning_cli import QatCLI
from qat.cli.trainer import Trainer
from qat.errors import QatError
from tests.cli.test_commands import fails


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "transformer-engine"])
def test_other_precisions_of_parameters(
    precision: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "fit", "--config", config, "--runs", tmp_path / "runs", "--trainer.precision", precision)
    assert f"trainer.precision is {precision}" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_2", "deepspeed", "xla"])
def test_strategies_that_shard(strategy: str) -> None:
    with pytest.raises(QatError, match=f"strategy is {strategy}: it cuts"):
        check_trainer(SimpleNamespace(precision=None, strategy=strategy))
    named = SimpleNamespace(class_path="lightning.pytorch.strategies.FSDPStrategy")
    with pytest.raises(QatError, match="FSDPStrategy: it cuts"):
        check_trainer(SimpleNamespace(precision=None, strategy=named))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "single_device"])
@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed", "16-mixed", 32])
def test_what_is_supported(strategy: str, precision: object) -> None:
    check_trainer(SimpleNamespace(precision=precision, strategy=strategy))


@pytest.mark.parametrize(
    ("verb", "calibrates", "trainer", "one"),
    [
        ("predict", False, {}, True),
        ("predict", False, {"devices": 4}, False),
        ("validate", True, {"precision": "bf16-mixed"}, True),
        ("validate", True, {"devices": "auto"}, False),
        ("validate", False, {}, False),
        ("fit", True, {}, False),
    ],
)
def test_predictions_and_calibrations_use_one_device_unless_told_otherwise(
    verb: str, calibrates: bool, trainer: dict[str, object], one: bool
) -> None:
    cli: Any = SimpleNamespace(verb=verb, calibrates=calibrates, given={verb: {"trainer": trainer}})
    assert QatCLI._runs_on_one_device(cli) is one


def test_the_trainer_sets_how_float32_is_multiplied() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        Trainer(float32_matmul_precision="high", accelerator="cpu", logger=False, enable_checkpointing=False)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def lengths(every: object, limit: object = 1.0, by_pass: int | None = 1) -> SimpleNamespace:
    return SimpleNamespace(val_check_interval=every, limit_train_batches=limit, check_val_every_n_epoch=by_pass)


@pytest.mark.parametrize(
    "trainer",
    [lengths(1.0), lengths(0.01), lengths(3), lengths(100, by_pass=None), lengths(2, limit=2), lengths(2, limit=0.7)],
    ids=str,
)
def test_intervals_that_fit_into_the_shortest_pass(trainer: SimpleNamespace) -> None:
    check_lengths(trainer, [6, 6, 3])


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (lengths(4), "val_check_interval is 4, and a pass over the images has 3 batches"),
        (lengths(3, limit=2), "has 2 batches"),
        (lengths(3, limit=0.7), "has 2 batches"),
        (lengths(1.0, limit=0.3), "limit_train_batches is 0.3: of 3 batches of a pass none is left"),
    ],
    ids=str,
)
def test_intervals_that_are_longer_than_a_pass(trainer: SimpleNamespace, message: str) -> None:
    with pytest.raises(QatError, match=message):
        check_lengths(trainer, [6, 6, 3])


def test_a_monitor_may_be_a_regularizer_or_come_from_a_callback_of_the_user() -> None:
    plain: dict[str, Any] = {"precision": None, "strategy": "auto", "max_steps": -1}
    stop = SimpleNamespace(
        class_path="lightning.pytorch.callbacks.EarlyStopping", init_args={"monitor": "train/dampening"}
    )
    own = SimpleNamespace(class_path="my.Callback", init_args={})
    with pytest.raises(QatError, match="monitors 'train/dampening', which is not logged"):
        check_trainer(SimpleNamespace(**plain, callbacks=[stop]))
    model = SimpleNamespace(regularizers=[{"class_path": "qat.training.regularizers.Dampening"}], teacher=None)
    check_trainer(SimpleNamespace(**plain, callbacks=[stop]), "fit", tuple(further_metrics(model, 0)))
    check_trainer(SimpleNamespace(**plain, callbacks=[stop, own]))


def test_a_monitor_may_be_of_features_or_of_images_that_are_held_out() -> None:
    alone, taught = SimpleNamespace(teacher=None), SimpleNamespace(teacher="deit", features={"modules": ["a"]})
    assert list(further_metrics(alone, 0)) == []
    assert list(further_metrics(alone, 8)) == ["held_out/loss", "held_out/top1"]
    assert list(further_metrics(taught, 8)) == ["train/features", "held_out/kl", "held_out/agreement"]


def test_a_schedule_needs_the_length_of_its_run() -> None:
    plain: dict[str, Any] = {"precision": None, "strategy": "auto", "max_epochs": -1}
    check_trainer(SimpleNamespace(**plain, max_steps=9))
    check_trainer(SimpleNamespace(**plain, max_steps=-1), "validate")
    with pytest.raises(QatError, match="the schedule of the learning rate needs the length"):
        check_trainer(SimpleNamespace(**plain, max_steps=-1))


@pytest.mark.parametrize("name", ["max_steps", "max_epochs"])
def test_a_training_of_no_step_is_refused_before_the_calibration(name) -> None:
    options = {"precision": None, "strategy": "auto", "max_epochs": None, "max_steps": -1, name: 0}
    with pytest.raises(QatError, match=f"trainer.{name} is 0: nothing would be trained"):
        check_trainer(SimpleNamespace(**options))
    check_trainer(SimpleNamespace(**options), "validate")
