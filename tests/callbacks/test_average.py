"""The weight average agrees with Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from qat.callbacks import PlaceModule, WeightAverage
from qat.callbacks.average import Average
from tests.training.runs import fit, tiny_module


class Save(L.Callback):
    """Writes a checkpoint after some step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_worked_example() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, decay=0.75)
    for value, wanted in ((4.0, 4.0), (8.0, 5.0), (1.0, 4.0)):  # 0.75 * 4 + 0.25 * 8, 0.75 * 5 + 0.25 * 1
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        assert average.module.weight.item() == wanted
    assert average.n_averaged == 3
    assert average.n_averaged.device.type == "cpu"


@pytest.mark.parametrize("every", [1, 2])
def test_checkpoints_are_those_of_lightning(every: int, images: Path, tmp_path: Path) -> None:
    contents = []
    for kind in (WeightAverage, EMAWeightAveraging):
        torch.manual_seed(0)
        path = tmp_path / f"{kind.__name__}.ckpt"
        callbacks = [PlaceModule(), kind(decay=0.9, update_every_n_steps=every), Save(path, 4)]
        fit(tiny_module(), images, tmp_path, callbacks, max_steps=5)
        contents.append(torch.load(path, weights_only=True))
    ours, theirs = contents
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert ours[key].keys() == theirs[key].keys()
        assert all(torch.equal(ours[key][name], value) for name, value in theirs[key].items())
    assert ours["callbacks"] == theirs["callbacks"]
    assert not torch.equal(ours["state_dict"]["model.head.weight"], ours["current_model_state"]["model.head.weight"])
