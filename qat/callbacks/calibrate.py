"""Calibration inside a Lightning run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import lightning as L
from torch import Tensor

from qat.data import ImageNetDataModule
from qat.errors import QatError
from qat.insert import quantizers, raise_for_uncalibrated
from qat.module import QATModule
from qat.ptq import InitSteps, PTQMethod

log = logging.getLogger(__name__)


class Calibrate(L.Callback):
    """Fills every quantizer with a `PTQMethod` on training images, before training or validation.

    It runs in ``setup``: after the data is known, before a checkpoint is restored, before DDP wraps the model and
    before the optimiser exists. Every rank sees the same images. Sites that are calibrated already are left alone.

    Args:
        method: how the quantizers are filled.
        images: training images, with the evaluation transform.
        batch_size: images in one forward.
        seed: which images.
    """

    def __init__(self, method: PTQMethod | None = None, images: int = 64, batch_size: int = 32, seed: int = 0) -> None:
        self.method = method or InitSteps()
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Calibrate on the device of the trainer, then check that nothing is left."""
        assert isinstance(pl_module, QATModule)
        if all(quantizer.calibrated for _, quantizer in quantizers(pl_module.model)):
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, ImageNetDataModule):
            raise QatError("calibration needs training images: pass an ImageNetDataModule, or calibrate before fitting")
        started = time.perf_counter()
        name = type(self.method).__name__
        log.info("calibrating with %s on %d training images ...", name, self.images)
        module = pl_module.to(trainer.strategy.root_device)  # setup comes before Lightning moves the model
        training = module.training
        module.eval()
        self.method(module.model, self._images(module, datamodule))
        module.train(training)
        raise_for_uncalibrated(module.model)
        log.info("calibrated %d sites in %.1f s", len(list(quantizers(module.model))), time.perf_counter() - started)

    def _images(self, module: QATModule, datamodule: ImageNetDataModule) -> Iterator[Tensor]:
        for batch in datamodule.calibration_batches(self.images, self.batch_size, self.seed):
            yield module.preprocessing.normalize(batch.to(module.device))
