"""The table of sites in the folder of a run."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qat.callbacks import RecordSites
from qat.training.module import QATModule
from qat.training.options import ModelOptions
from tests.conftest import TINY


def test_a_resumed_run_keeps_the_errors_of_the_calibration(tmp_path: Path) -> None:
    options = ModelOptions(
        "deit_tiny_patch16_224", None, num_classes=3, model_args=TINY, recipe="lsq", w_bits=4, a_bits=4
    )
    module, trainer = QATModule(options), SimpleNamespace(is_global_zero=True)
    module.calibration = {"snr_db": {"head.input_quant": 12.5}}
    for calibration in (module.calibration, {}):
        module.calibration = calibration
        record: Any = RecordSites(tmp_path)
        record.on_fit_start(trainer, module)
        with (tmp_path / "quantization.csv").open() as file:
            errors = {row["site"]: row["snr_db"] for row in csv.DictReader(file)}
        assert errors["head.input_quant"] == "12.5"
        assert errors["head.weight_quant"] == ""
