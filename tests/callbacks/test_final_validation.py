"""A run ends with a validation of its last step, and with only one."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest

from qat.callbacks import FinalValidation, WeightAverage
from tests.training.runs import fit, tiny_module


class Validations(L.Callback):
    """The steps at which the model was validated, and one of its weights there."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append((trainer.global_step, float(trainer.callback_metrics["val/top1"])))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, [6, 7]),  # in the middle of the second pass
        ({"max_steps": 6}, [6]),  # at the end of the first
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, [12, 18]),
        ({"max_steps": 7, "limit_val_batches": 0}, []),
    ],
    ids=str,
)
def test_the_last_step_is_validated_once(options: dict[str, int], steps: list[int], images: Path, tmp_path: Path):
    watch = Validations()
    trainer = fit(tiny_module(), images, tmp_path, [watch, FinalValidation()], **{"limit_val_batches": 1, **options})
    assert [step for step, _ in watch.seen] == steps
    assert not trainer.validating


def test_the_average_is_what_is_validated(images: Path, tmp_path: Path) -> None:
    """Lightning swaps the average in for a validation; when training has ended it is there for good."""
    kept: list[float] = []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):  # type: ignore[no-untyped-def]
            kept.append(pl_module.model.head.weight[0, 0].item())

    module = tiny_module(lr=0.1)
    fit(module, images, tmp_path, [Look(), FinalValidation(), WeightAverage(0.5)], limit_val_batches=1, max_steps=2)
    assert kept == [module.model.head.weight[0, 0].item()]
