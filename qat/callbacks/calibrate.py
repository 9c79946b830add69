"""Calibration on training images, as a callback: the values of all quantizers are there before training starts."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from qat.checkpoint import Card
from qat.data.imagenet import ImageNetDataModule
from qat.errors import QatError
from qat.ptq import InitSteps, PTQMethod, site_errors
from qat.ptq.cache import Cache
from qat.ptq.options import CalibrationOptions
from qat.ptq.unit_store import UnitStore, remove_units
from qat.runs.folder import CALIBRATED, UNITS
from qat.runs.stop import Stopped, raise_if_told
from qat.sites.insert import quantizers, raise_for_uncalibrated
from qat.training.module import QATModule

log = logging.getLogger(__name__)
MEASURED = 32  # images on which the error of every site is measured, at most


class Calibrate(L.Callback):
    """Fills the quantizers with a `PTQMethod` on training images, before training, validation or prediction.

    It runs in ``setup``: after the data is known, before a checkpoint is restored, before DDP wraps the model and
    before the optimizer exists. Nothing happens to a model that the method does not want, by default one that is
    calibrated already. Quantizers that the method has chosen become rules of the card. The error of every site is
    measured afterwards, and the model is saved as ptq.ckpt.

    Args:
        options: the method, how many images it sees, and the seed that draws them.
        folder: folder of the run, where ptq.ckpt is saved; it is not saved where this is None.
        keeps_units: keep finished units there until the end, so that a calibration that is killed can go on.
        begin: called by the first process before the work starts; it may write a file, whose path it returns.
    """

    def __init__(
        self, options: CalibrationOptions, folder: Path | None = None, keeps_units: bool = False,
        begin: Callable[[], Path] | None = None,
    ) -> None:  # fmt: skip
        self.method: PTQMethod = options.method or InitSteps()
        self.images, self.batch_size, self.seed = options.images, options.batch_size, options.seed
        self.folder, self.keeps_units, self.begin = folder, keeps_units, begin
        self.cache = Cache(options.cache_gb, folder)
        self.seconds = 0.0  # duration of ``setup``

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Calibrate on the device of the trainer, check that nothing is left, measure and save."""
        assert isinstance(pl_module, QATModule)
        if not self.method.wants(pl_module.model):
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, ImageNetDataModule):
            raise QatError("calibration needs training images: pass an ImageNetDataModule, or calibrate before fitting")
        self.check_devices(trainer.world_size, trainer.state.fn == TrainerFn.FITTING)
        started, name = time.perf_counter(), type(self.method).__name__
        log.info("calibrating with %s on %d images ...", name, self.images)
        module = pl_module.to(trainer.strategy.root_device)  # setup comes before Lightning moves the model
        self.method.cache = self.cache
        with PeakMemory(module.device) as memory, self._stored(module, datamodule) as store, self._begun(trainer):
            self.method(module.model, self._read(module, datamodule, self.images))
        raise_for_uncalibrated(module.model)
        module.card = with_chosen(module.card, self.method.chosen)
        seconds = time.perf_counter() - started + (store.seconds_before if store is not None else 0)
        count = len(list(quantizers(module.model)))
        log.info("calibrated %d sites in %.1f s, peak memory %.0f MB", count, seconds, memory.megabytes)
        errors = site_errors(module.model, self._read(module, datamodule, min(self.images, MEASURED)))
        held_out = {"held_out": datamodule.options.held_out} if datamodule.options.held_out else {}
        module.calibration = self._results(seconds, memory.megabytes, errors) | held_out
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / CALIBRATED, weights_only=True)
            if trainer.is_global_zero:
                log.info("saved %s", self.folder / CALIBRATED)
                remove_units(self.folder / UNITS)
        self.seconds = time.perf_counter() - started

    @contextmanager
    def _begun(self, trainer: L.Trainer) -> Iterator[None]:
        """Leave no file of a calibration that could not go on."""
        written = self.begin() if self.begin is not None and trainer.is_global_zero else None
        try:
            yield
        except BaseException:
            if written is not None and not any((written.parent / UNITS).glob("*.pt")):
                written.unlink(missing_ok=True)
            raise

    def check_devices(self, count: int, trains: bool) -> None:
        """Raise QatError for several devices, unless training follows and all of them get the same values."""
        if count > 1 and (self.method.single_device or not trains):
            raise QatError(
                f"calibration with {type(self.method).__name__} runs on one device, and this run has {count}: run "
                "`qat calibrate` with --trainer.devices 1 first, then give its ptq.ckpt as --model.quant_checkpoint to "
                "`qat fit`, or as --ckpt to other commands"
            )

    @contextmanager
    def _stored(self, module: QATModule, datamodule: ImageNetDataModule) -> Iterator[UnitStore | None]:
        """Keep finished units in the folder of the run until `ptq.ckpt` is there; say how a calibration can go on."""
        if self.folder is None or not self.keeps_units:
            yield None
            return
        card = {name: value for name, value in module.card.to_dict().items() if name != "rules"}
        what = {
            "method": repr(self.method), "images": self.images, "batch_size": self.batch_size, "seed": self.seed,
            "place": datamodule.calibration_place, "data.held_out": datamodule.options.held_out,
            "weights": digest(module.model), **card,
            "recipe": sha256(repr(module.card.rules).encode()).hexdigest(),
        }  # fmt: skip
        store = self.method.store = UnitStore(self.folder / UNITS, what)
        if store.kept:
            log.info("going on after %s", store.kept)
        try:
            yield store
        except Stopped as stopped:
            if store.kept:
                how = str(stopped).removeprefix("stopped ")
                how += f" after {store.kept}; the same command with --resume {self.folder} goes on"
                raise Stopped(stopped.signum, how) from None
            raise
        finally:
            self.method.store = None

    def _results(self, seconds: float, megabytes: float, errors: dict[str, float]) -> dict[str, Any]:
        """What checkpoint and results say about the calibration."""
        told = {"chosen": self.method.chosen, "report": self.method.report}
        return {
            "method": repr(self.method),
            "images": self.images,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "seconds": round(seconds, 2),
            "peak_memory_mb": round(megabytes),
            "snr_db": errors,
            **{name: value for name, value in told.items() if value},
        }

    def _read(self, module: QATModule, datamodule: ImageNetDataModule, images: int) -> CalibrationImages:
        return CalibrationImages(module, datamodule, images, self.batch_size, self.seed)


def digest(model: torch.nn.Module) -> str:
    """Of all values of a model, as text: another one stands for other values."""
    found = sha256()
    for value in model.state_dict().values():
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def with_chosen(card: Card, chosen: Mapping[str, dict[str, Any] | None]) -> Card:
    """The card of a model in which a method has replaced quantizers: a rule for each such site, after all others.

    Args:
        card: of the model as its recipe describes it.
        chosen: the spec of every quantizer that was replaced, as plain data, by the name of its site; None where it
            was taken away.

    Raises:
        QatError: a spec that a reader of the checkpoint would refuse.
    """
    if not chosen:
        return card
    rules = [{"match": site, "spec": spec} for site, spec in chosen.items()]
    return Card.from_dict(replace(card, rules=[*card.rules, *rules]).to_dict(), "calibration")


@dataclass(frozen=True)
class CalibrationImages:
    """Batches (b, 3, S, S) of normalized images on the device of the module, read anew in every iteration."""

    module: QATModule
    datamodule: ImageNetDataModule
    images: int
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.datamodule.calibration_batches(self.images, self.batch_size, self.seed):
            raise_if_told()
            yield self.module.preprocessing.normalize(batch.to(self.module.device))


class PeakMemory:
    """The most memory that was in use inside the block: on a GPU what its allocator gave, else that of the process.

    The peak of a process never falls, so it may stem from work before the block. It is 0 on Windows.
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
