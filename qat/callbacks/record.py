"""What a run leaves beside its checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L

from qat.describe import describe, summary, write_csv
from qat.module import QATModule

log = logging.getLogger(__name__)


class RecordSites(L.Callback):
    """Writes the resolved quantization table, as it is when training starts, to ``folder/quantization.csv``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table and log where the run goes."""
        assert isinstance(pl_module, QATModule)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_csv(describe(pl_module.model), self.folder / "quantization.csv")
            log.info("%s: %s", pl_module.card.arch, summary(pl_module.model))
            log.info("run folder %s", self.folder)
