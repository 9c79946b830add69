"""What a run leaves beside its checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from qat.sites.describe import describe, summary, write_csv
from qat.training.module import QATModule

log = logging.getLogger(__name__)


class RecordSites(L.Callback):
    """Writes the resolved quantization table to ``folder/quantization.csv``, when training or evaluation starts.

    Where the run has calibrated, the table has the signal-to-noise ratio of every site.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table and log where the run goes."""
        assert isinstance(pl_module, QATModule)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = describe(pl_module.model, pl_module.calibration.get("snr_db"))
            write_csv(rows, self.folder / "quantization.csv")
            log.info("%s: %s", pl_module.card.arch, summary(pl_module.model))
            log.info("run folder %s", self.folder)

    on_predict_start = on_fit_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same, of a run that only evaluates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_start(trainer, pl_module)
