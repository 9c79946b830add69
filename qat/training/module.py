"""The training module: a quantized timm model, its losses, its optimizer. No quantization arithmetic.

Shapes: B crops in a step, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from qat.checkpoint import KEY, check_restored
from qat.data.images import Batch, TopK
from qat.data.streams import rng_for
from qat.errors import QatError
from qat.models import param_groups, regroup
from qat.preprocessing import Preprocessing
from qat.sites.insert import quantizers, raise_for_uncalibrated
from qat.training.finite import FiniteCheck
from qat.training.length import total_steps
from qat.training.losses import cross_entropy, entropy
from qat.training.options import ModelOptions
from qat.training.regularizers import named
from qat.training.schedules import cosine_with_warmup
from qat.training.student import build_student
from qat.training.teacher import Teacher, build_teacher


class Prediction(NamedTuple):
    """What `predict_step` returns for a batch."""

    paths: tuple[str, ...]
    classes: Tensor  # (B, 5) int64, most probable first
    probs: Tensor  # (B, 5)


class QATModule(L.LightningModule):
    """Quantization-aware training of a timm model."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        self.model, self.card, self.calibration = build_student(options)
        self.preprocessing = Preprocessing(**self.card.preprocessing)
        self.total = 0  # optimizer steps of the run
        self.run_options: dict[str, Any] = {}  # kept in the checkpoint; the command line fills it
        self.regularizers = named(options.regularizers or [])
        for regularizer in self.regularizers.values():
            regularizer.choose(self.model)  # QatError, before training, when it matches nothing
        outputs = self.card.num_classes
        self.teacher: tuple[
            Teacher, ...
        ] = ()  # no submodule: a teacher has no place in the checkpoint or the optimizer
        if options.teacher is not None:
            self.teacher = (build_teacher(options.teacher, options.teacher_checkpoint, outputs, options.classes),)
        self.top1 = MulticlassAccuracy(outputs, average="micro")
        self.top5 = MulticlassAccuracy(outputs, average="micro", top_k=min(5, outputs))
        self.val_loss = MeanMetric()
        self.finite = FiniteCheck()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of uint8 images (B, 3, S, S)."""
        logits: Tensor = self.model(self.preprocessing.normalize(images))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch of crops; QatError names the step when it is not finite."""
        labels = self.soft_labels(batch)  # before the student's graph takes the memory
        loss = cross_entropy(self(batch.images), batch.labels if labels is None else labels)
        self.finite.check(loss, f"step {self.global_step} (epoch {self.current_epoch})")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.images), sync_dist=True)
        if labels is not None:
            floor = entropy(labels, self.card.num_classes)
            self.log_dict(
                {"train/label_entropy": floor, "train/kl": loss - floor}, batch_size=len(batch.images), sync_dist=True
            )
        first, *_, last = self.trainer.optimizers[0].param_groups
        self.log_dict({"lr": first["lr"], "step_lr": last["lr"]})
        for name, penalty in self.penalties():
            self.log(f"train/{name}", penalty, batch_size=len(batch.images))
            loss = loss + penalty
        return loss

    def penalties(self) -> Iterator[tuple[str, Tensor]]:
        """Name and weighted loss of every regularizer whose weight is above zero by now; others are not computed."""
        for name, regularizer in self.regularizers.items():
            if weight := regularizer.weight_at(self.progress):
                yield name, weight * regularizer(self.model)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Those that an average makes sense of: integers, such as the index of Swin, would be rounded down."""
        return (buffer for buffer in super().buffers(recurse) if buffer.is_floating_point())

    @property
    def progress(self) -> float:
        """The part of training that is done, 0 to 1."""
        return self.global_step / max(self.total, 1)

    def soft_labels(self, batch: Batch) -> Tensor | TopK | None:
        """The teacher's probabilities (B, C) if there is one, else the soft labels of the batch, if it has some."""
        return self.teacher[0](batch.images).float().softmax(-1) if self.teacher else batch.soft_labels

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make drop path a function of (seed, pass, batch, rank): a resumed run draws what it would have drawn."""
        rng = rng_for(
            self.options.seed or 0, self.current_epoch, batch_idx * self.trainer.world_size + self.global_rank
        )
        torch.manual_seed(int(rng.integers(2**63)))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step, then steps are moved back to legal values, before anything (a weight average) reads them."""
        super().optimizer_step(*args, **kwargs)
        for _, quantizer in quantizers(self.model):
            quantizer.project_()

    def on_fit_start(self) -> None:
        """Refuse to train with a forgotten calibration; bring the teacher to the device."""
        raise_for_uncalibrated(self.model)
        for teacher in self.teacher:
            teacher.to(self.device)

    def on_train_start(self) -> None:
        """What the options say wins over what a checkpoint has restored."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        assert isinstance(config.scheduler, LambdaLR)
        regroup(optimizer, config.scheduler, self.groups(), betas=self.options.betas, eps=self.options.eps)

    def on_validation_start(self) -> None:
        """Refuse to evaluate with a forgotten calibration."""
        if self.global_step == 0:
            raise_for_uncalibrated(self.model)

    on_predict_start = on_validation_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count hits and sum the loss; the metrics are exact over all images, whatever the batches."""
        if not len(batch.images):
            return
        logits = self(batch.images).float()
        self.top1.update(logits, batch.labels)
        self.top5.update(logits, batch.labels)
        self.val_loss.update(F.cross_entropy(logits, batch.labels), weight=len(batch.images))

    def on_validation_epoch_end(self) -> None:
        """Log top-1 and top-5 in percent, and the mean cross-entropy on labels."""
        self.log("val/top1", 100 * self.top1.compute(), prog_bar=True)
        self.log("val/top5", 100 * self.top5.compute())
        self.log("val/loss", self.val_loss.compute(), prog_bar=True)
        self.log("val/images", self.val_loss.weight, sync_dist=True, reduce_fx="sum")
        for metric in (self.top1, self.top5, self.val_loss):
            metric.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        """The five most probable classes of each image."""
        probs, classes = self(batch.images).float().softmax(-1).topk(min(5, self.card.num_classes))
        return Prediction(batch.paths, classes, probs)

    def configure_optimizers(self) -> Any:
        """AdamW with undecayed groups, and a cosine that falls at every optimizer step."""
        self.total = total_steps(self.trainer)
        optimizer = AdamW(self.groups(), lr=self.options.lr, betas=self.options.betas, eps=self.options.eps)
        floor, warmup = self.options.min_lr / self.options.lr, self.options.warmup_steps
        schedule = LambdaLR(optimizer, lambda step: cosine_with_warmup(step, self.total, warmup, floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rate and weight decay."""
        options = self.options
        step_lr = options.lr if options.step_lr is None else options.step_lr
        return param_groups(self.model, options.weight_decay, options.lr, step_lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add card and options; QatError rather than overwrite a good checkpoint with weights that are not finite."""
        for name, value in self.model.state_dict().items():
            if not torch.isfinite(value).all():
                raise QatError(f"{name} is not finite at step {self.global_step}; the last good checkpoint is kept")
        told = {key: value for key, value in self.calibration.items() if key != "snr_db" or self.global_step == 0}
        checkpoint[KEY] = self.card.to_dict() | {"options": self.run_options, "calibration": told}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """QatError when the checkpoint describes another model, or a run that cannot go on as it is now."""
        trainer: L.Trainer = self.trainer
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        check_restored(checkpoint, self.card, fits=trainer.state.fn == TrainerFn.FITTING, averages=averages)
        self.calibration = checkpoint[KEY].get("calibration", {})
