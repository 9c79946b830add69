"""Calibration inside a Lightning run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from qat.data.imagenet import ImageNetDataModule
from qat.errors import QatError
from qat.ptq import InitSteps, PTQMethod, site_errors
from qat.ptq.options import CalibrationOptions
from qat.runs.folder import CALIBRATED
from qat.sites.insert import quantizers, raise_for_uncalibrated
from qat.training.module import QATModule

log = logging.getLogger(__name__)
MEASURED = 32  # images on which the error of every site is measured


class Calibrate(L.Callback):
    """Fills every quantizer with a `PTQMethod` on training images, before training, validation or prediction.

    It runs in ``setup``: after the data is known, before a checkpoint is restored, before DDP wraps the model and
    before the optimizer exists. Sites that are calibrated already are left alone. What comes out is measured site by
    site and saved as ptq.ckpt, a checkpoint that describes itself.

    Args:
        options: the method, and how many images of which draw it sees.
        folder: of the run, where ptq.ckpt is saved; None saves none.
    """

    def __init__(self, options: CalibrationOptions, folder: Path | None = None) -> None:
        self.method: PTQMethod = options.method or InitSteps()
        self.images, self.batch_size, self.seed = options.images, options.batch_size, options.seed
        self.folder = folder
        self.seconds = 0.0  # that it took in all

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Calibrate on the device of the trainer, check that nothing is left, measure and save."""
        assert isinstance(pl_module, QATModule)
        if all(quantizer.calibrated for _, quantizer in quantizers(pl_module.model)):
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, ImageNetDataModule):
            raise QatError("calibration needs training images: pass an ImageNetDataModule, or calibrate before fitting")
        self.check_devices(trainer.world_size, trainer.state.fn == TrainerFn.FITTING)
        started, name = time.perf_counter(), type(self.method).__name__
        log.info("calibrating with %s on %d training images ...", name, self.images)
        module = pl_module.to(trainer.strategy.root_device)  # setup comes before Lightning moves the model
        with PeakMemory(module.device) as memory:
            self.method(module.model, self._batches(module, datamodule, self.images))
        raise_for_uncalibrated(module.model)
        seconds, count = time.perf_counter() - started, len(list(quantizers(module.model)))
        log.info("calibrated %d sites in %.1f s, peak memory %.0f MB", count, seconds, memory.megabytes)
        module.calibration = {
            "method": repr(self.method),
            "images": self.images,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "seconds": round(seconds, 2),
            "peak_memory_mb": round(memory.megabytes),
            "snr_db": site_errors(module.model, self._batches(module, datamodule, min(self.images, MEASURED))),
        }
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / CALIBRATED, weights_only=True)
            if trainer.is_global_zero:
                log.info("saved %s", self.folder / CALIBRATED)
        self.seconds = time.perf_counter() - started

    def check_devices(self, count: int, trains: bool) -> None:
        """Raise QatError for more than one device, unless each comes to the same values and training follows."""
        if count > 1 and (self.method.single_device or not trains):
            raise QatError(
                f"calibration with {type(self.method).__name__} runs on one device, and this run has {count}: run "
                "`qat validate` with --trainer.devices 1 first, then give its ptq.ckpt as --model.quant_checkpoint to "
                "`qat fit`, or as --ckpt to other commands"
            )

    def _batches(self, module: QATModule, datamodule: ImageNetDataModule, images: int) -> Batches:
        return Batches(module, datamodule, images, self.batch_size, self.seed)


@dataclass(frozen=True)
class Batches:
    """Normalized training images (b, 3, S, S) on the device of the module, read batch by batch, as often as asked."""

    module: QATModule
    datamodule: ImageNetDataModule
    images: int
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.datamodule.calibration_batches(self.images, self.batch_size, self.seed):
            yield self.module.preprocessing.normalize(batch.to(self.module.device))


class PeakMemory:
    """The most memory that was in use inside the block: of the device, or resident of the process on a CPU.

    The latter never falls, so work before the block may have set it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.megabytes = 0.0  # 10**6 bytes

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated(self.device) / 1e6
        elif sys.platform != "win32":
            import resource  # Windows has none

            unit = 1 if sys.platform == "darwin" else 1024
            self.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
