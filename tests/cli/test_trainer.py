"""What our trainer adds to Lightning's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.cli.trainer import TRAINER_DEFAULTS, Trainer
from qat.errors import QatError
from tests.training.runs import tiny_data, tiny_module


def test_a_loss_that_is_no_number_has_a_cause(images: Path) -> None:
    module = tiny_module(recipe="float", w_bits=None, a_bits=None)
    with torch.no_grad():
        module.model.get_parameter("head.weight")[0, 0] = torch.nan
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, **TRAINER_DEFAULTS)
    with pytest.raises(QatError, match=r"validation loss is nan: head\.weight has values that are not finite"):
        trainer.validate(module, datamodule=tiny_data(images))
