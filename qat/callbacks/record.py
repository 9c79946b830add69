"""The table of quantized sites in the folder of a run."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from qat.sites.describe import describe, summary, write_csv
from qat.training.module import QATModule

log = logging.getLogger(__name__)


class RecordSites(L.Callback):
    """Writes all sites with their quantizers to ``folder/quantization.csv``, when training or evaluation starts.

    After a calibration the table also has the signal-to-noise ratio of every site.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table and log the folder of the run."""
        assert isinstance(pl_module, QATModule)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            table, errors = self.folder / "quantization.csv", pl_module.calibration.get("snr_db")
            if errors or not table.exists():  # a resumed run knows no errors any more: the table has them already
                write_csv(describe(pl_module.model, errors), table)
            log.info("%s: %s", pl_module.card.arch, summary(pl_module.model))
            log.info("run folder %s", self.folder)

    on_predict_start = on_fit_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do the same in a run that only evaluates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_start(trainer, pl_module)
