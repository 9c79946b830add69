"""When a calibration runs inside a Lightning run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qat.callbacks import Calibrate
from qat.callbacks.calibrate import with_chosen
from qat.errors import QatError
from qat.ptq import InitSteps
from qat.ptq.options import CalibrationOptions
from tests.training.runs import tiny_data, tiny_module, tiny_trainer


class Refine(InitSteps):
    """A method that also improves a model that is calibrated already."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.calls = wanted, 0

    def wants(self, model: nn.Module) -> bool:
        return self.wanted

    def calibrate(self, model: nn.Module, batches: object) -> None:
        self.calls += 1


@pytest.mark.parametrize("wanted", [True, False])
def test_the_method_decides_about_a_calibrated_model(wanted: bool, images: Path, tmp_path: Path) -> None:
    module, method = tiny_module(), Refine(wanted)
    InitSteps()(module.model, [torch.randn(2, 3, 32, 32)])
    calibrate = Calibrate(CalibrationOptions(method, images=4, batch_size=4))
    trainer = tiny_trainer(tmp_path, [calibrate], max_steps=1)
    trainer.fit(module, datamodule=tiny_data(images))
    assert method.calls == int(wanted)
    assert bool(module.calibration) is wanted


def test_a_chosen_quantizer_is_one_more_rule_of_the_card_or_is_refused() -> None:
    card, site = tiny_module().card, "blocks.1.mlp.fc2.input_quant"
    spec = {"class_path": "LSQ", "init_args": {"bits": 6}}
    assert with_chosen(card, {}) is card
    assert with_chosen(card, {site: None}).rules == [*card.rules, {"match": site, "spec": None}]
    assert with_chosen(card, {site: spec}).rules == [*card.rules, {"match": site, "spec": spec}]
    with pytest.raises(QatError, match="NoSuch"):
        with_chosen(card, {site: {"class_path": "NoSuch", "init_args": {"bits": 6}}})
