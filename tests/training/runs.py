"""Short runs of a tiny model, without the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from qat.callbacks import Calibrate
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.ptq.options import CalibrationOptions
from qat.training.module import QATModule
from qat.training.options import ModelOptions
from tests.conftest import TINY

ARCH = "deit_tiny_patch16_224"


def tiny_module(**options: Any) -> QATModule:
    """A quantized model with three classes, not yet calibrated."""
    defaults = {"recipe": "vvtq", "w_bits": 3, "a_bits": 3, "checkpoint": None}
    return QATModule(ModelOptions(arch=ARCH, model_args=TINY, num_classes=3, **{**defaults, **options}))


def tiny_data(images: Path) -> ImageNetDataModule:
    """Passes of 6 batches of 4 crops."""
    module = QATModule(ModelOptions(arch=ARCH, model_args=TINY, checkpoint=None, num_classes=3))
    return ImageNetDataModule(
        DataOptions(root=images, batch_size=8, crops_per_image=2, crop_epochs=40, workers=0,
                    preprocessing=module.preprocessing.to_dict())
    )  # fmt: skip


def tiny_trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A trainer on the CPU that saves nothing by itself."""
    return L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=callbacks, enable_checkpointing=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        **{"logger": False, "enable_progress_bar": False, "limit_val_batches": 0, **options},
    )  # fmt: skip


def fit(
    module: QATModule, images: Path, folder: Path, callbacks: list[L.Callback] | None = None, **options: Any
) -> L.Trainer:
    """Calibrate and train."""
    calibrate = Calibrate(CalibrationOptions(images=4, batch_size=4))
    trainer = tiny_trainer(folder, [calibrate, *(callbacks or [])], **options)
    trainer.fit(module, datamodule=tiny_data(images))
    return trainer
