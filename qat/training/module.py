"""The training module: a quantized timm model, its losses, its optimizer. No quantization arithmetic.

Shapes: B crops in a step, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from qat.checkpoint import KEY, check_restored, has_older_groups
from qat.data.images import Batch, TopK
from qat.data.streams import rng_for
from qat.errors import QatError
from qat.models import param_groups, regroup
from qat.preprocessing import Preprocessing
from qat.quantizers.projection import Projection
from qat.sites.insert import quantizers, raise_for_uncalibrated
from qat.training.features import FeatureLoss, as_float
from qat.training.finite import FiniteCheck, check_weights
from qat.training.length import total_steps
from qat.training.losses import cross_entropy
from qat.training.metrics import HeldOutMetrics, ValidationMetrics
from qat.training.options import ModelOptions
from qat.training.records import Prediction, StepRecord
from qat.training.regularizers.penalties import Penalties
from qat.training.schedules import cosine_with_warmup
from qat.training.student import build_student
from qat.training.teacher import Teacher, build_teacher

log = logging.getLogger(__name__)


class QATModule(L.LightningModule):
    """Quantization-aware training of a timm model.

    A training step makes the host wait for the device only where Lightning writes its metrics.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        self.model, self.card, self.calibration, self.uncompiled = build_student(options)
        self.preprocessing = Preprocessing(**self.card.preprocessing)
        self.total = 0  # optimizer steps of the run
        self.undivided = False  # one group beside the steps, to resume an older run without decay to the bit
        self.run_options: dict[str, Any] = {}  # kept in the checkpoint; the command line fills it
        self.penalties = Penalties(options.regularizers or [], self.model)
        outputs = self.card.num_classes
        # In a tuple, so that it is no submodule: a teacher has no place in the checkpoint or the optimizer.
        self.teacher: tuple[Teacher, ...] = ()
        if options.teacher is not None:
            weights, names = options.teacher_checkpoint, options.classes
            self.teacher = (build_teacher(options.teacher, weights, outputs, names, trust=options.trust),)
        teacher = self.teacher[0].model if self.teacher else None
        self.features = FeatureLoss(options.features, self.model, teacher)
        for own in self.teacher if self.features.pairs else ():
            with as_float(self.model):
                self.features.check(self, own, self.preprocessing.size)
        self.validation, self.held_out = ValidationMetrics(outputs), HeldOutMetrics(bool(self.teacher))
        self.finite = FiniteCheck()
        self.project: Projection | None = None
        self.record: StepRecord | None = None  # of the last batch, until it is logged
        self.logs_at_batch_end = self.is_monitored = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of uint8 images (B, 3, S, S)."""
        logits: Tensor = self.model(self.preprocessing.normalize(images))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch of crops; QatError names the step when it is not finite."""
        with self.features.watching_teacher():
            labels = self.soft_labels(batch)  # before the student's graph takes the memory
        with self.features.watching_student():
            logits = self(batch.images)
        loss = cross_entropy(logits, batch.labels if labels is None else labels)
        self.finite.check(loss, f"step {self.global_step} (epoch {self.current_epoch})")
        penalties = self.features.take() | dict(self.penalties.at(self.progress))
        detached = {name: penalty.detach() for name, penalty in penalties.items()}
        self.record = StepRecord(loss.detach(), labels, detached, self.rates(), len(batch.images), self.is_due())
        if self.record.due and not self.logs_at_batch_end:
            self.log_record()
        return sum(penalties.values(), loss)

    def is_due(self) -> bool:
        """Whether the metrics of the step that comes next are written, or a callback monitors one of them."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.is_monitored or bool(every and (self.global_step + 1) % every == 0)

    def log_record(self) -> None:
        """Log losses, averaged over processes, and learning rates of the last batch."""
        assert self.record is not None
        record, self.record = self.record, None
        self.log_dict(record.losses(self.card.num_classes), batch_size=record.crops, sync_dist=True)
        self.log_dict({f"train/{name}": loss for name, loss in record.penalties.items()}, batch_size=record.crops)
        self.log_dict(record.rates)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log a step after which a callback ends the run: Lightning writes its metrics too.

        From then on every step is logged here, because Lightning keeps what two hooks log under one name apart, and
        would write the older value.
        """
        self.logs_at_batch_end |= self.trainer.should_stop
        if self.logs_at_batch_end and self.record is not None and (self.record.due or self.trainer.should_stop):
            self.log_record()
        if self.record is None:  # it was logged, so the host waits for this step in any case
            self.finite.wait()

    def on_train_end(self) -> None:
        """Look at the losses that are still on their way."""
        self.finite.wait()

    def rates(self) -> dict[str, float]:
        """The learning rates of weights and of steps."""
        first, *_, last = self.trainer.optimizers[0].param_groups
        return {"lr": first["lr"], "step_lr": last["lr"]}

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The buffers that a weight average can average: integers, such as the index of Swin, would be rounded down."""
        return (buffer for buffer in super().buffers(recurse) if buffer.is_floating_point())

    @property
    def progress(self) -> float:
        """Optimizer steps done, over those of the whole run: 0 to 1."""
        return self.global_step / max(self.total, 1)

    def soft_labels(self, batch: Batch) -> Tensor | TopK | None:
        """Probabilities (B, C) of the teacher; without a teacher, the soft labels of the batch, or None."""
        return self.teacher[0](batch.images).float().softmax(-1) if self.teacher else batch.soft_labels

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed drop path by (seed, pass, batch, rank), so that a resumed run draws what the whole run draws."""
        rng = rng_for(
            self.options.seed or 0, self.current_epoch, batch_idx * self.trainer.world_size + self.global_rank
        )
        torch.manual_seed(int(rng.integers(2**63)))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take one step, then make the quantizers' parameters legal again, before a weight average reads them."""
        super().optimizer_step(*args, **kwargs)
        assert self.project is not None
        self.project()

    def on_fit_start(self) -> None:
        """Raise QatError where calibration was forgotten; move the teacher to the device."""
        raise_for_uncalibrated(self.model)
        self.project = Projection(quantizer for _, quantizer in quantizers(self.model))
        self.penalties.choose(self.model)  # loading may have replaced parameters
        self.finite, self.logs_at_batch_end = FiniteCheck(), False
        monitors = [str(getattr(callback, "monitor", "")) for callback in self.trainer.callbacks]  # type: ignore[attr-defined]
        self.is_monitored = any(name.startswith("train/") or name in self.rates() for name in monitors)
        self.warn_of_images_seen()
        for teacher in self.teacher:
            self.features.follow(self.calibration, teacher.model)
            teacher.to(self.device)

    def warn_of_images_seen(self) -> None:
        """Say that the calibration may have seen images that are held out now."""
        options = getattr(self.trainer.datamodule, "options", None)  # type: ignore[attr-defined]
        now, then = getattr(options, "held_out", 0), self.calibration.get("held_out", 0)
        if now and now != then and self.calibration and self.global_step == 0:
            log.warning("data.held_out is %d, and the model was calibrated with %d: it may have seen them", now, then)

    def on_train_start(self) -> None:
        """Let the options of the run win over those that a checkpoint has restored: its length, and the optimizer's."""
        self.total = total_steps(self.trainer)
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        assert isinstance(config.scheduler, LambdaLR)
        regroup(optimizer, config.scheduler, self.groups(), betas=self.options.betas, eps=self.options.eps)

    def on_validation_start(self) -> None:
        """Raise QatError where calibration was forgotten."""
        if self.global_step == 0:
            raise_for_uncalibrated(self.model)

    on_predict_start = on_validation_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of validation images, or of held-out ones, which the second loader has."""
        if not len(batch.images):
            return
        logits = self(batch.images).float()
        if dataloader_idx:
            teacher = self.teacher[0](batch.images).float() if self.teacher else None
            self.held_out.update(logits, batch.labels, teacher)
        else:
            self.validation.update(logits, batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured; QatError where no validation image was read."""
        images = self.validation.images
        if not torch.as_tensor(self.all_gather(images)).sum():
            raise QatError("not a single validation image could be read, so nothing can be measured")
        self.log("val/images", images, sync_dist=True, reduce_fx="sum")
        for name, value in self.validation.take().items():
            self.log(name, value, prog_bar=name != "val/top5")
        if len(self.trainer.num_val_batches) > 1:
            if not torch.as_tensor(self.all_gather(self.held_out.images)).sum():
                raise QatError("not a single held-out image could be read, so no checkpoint can be chosen")
            self.log_dict(self.held_out.take())

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        """The five most probable classes of each image."""
        probs, classes = self(batch.images).float().softmax(-1).topk(min(5, self.card.num_classes))
        return Prediction(batch.paths, classes, probs)

    def configure_optimizers(self) -> Any:
        """AdamW with groups that are not decayed, and a cosine schedule that moves at every optimizer step."""
        self.total = total_steps(self.trainer)
        optimizer = AdamW(self.groups(), lr=self.options.lr, betas=self.options.betas, eps=self.options.eps)
        floor, warmup = self.options.min_lr / self.options.lr, self.options.warmup_steps
        schedule = LambdaLR(optimizer, lambda step: cosine_with_warmup(step, self.total, warmup, floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rate and weight decay."""
        options = self.options
        step_lr = options.lr if options.step_lr is None else options.step_lr
        return param_groups(self.model, options.weight_decay, options.lr, step_lr, self.undivided)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add card and options; QatError rather than overwrite a good checkpoint with weights that are not finite."""
        check_weights(self.model.state_dict(), self.global_step)
        # Errors of sites are those of the calibrated model: training changes them.
        kept = {key: value for key, value in self.calibration.items() if key != "snr_db" or self.global_step == 0}
        checkpoint[KEY] = self.card.to_dict() | {"options": self.run_options, "calibration": kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise QatError when the checkpoint holds another model, or lacks a callback that its run needs to resume."""
        trainer: L.Trainer = self.trainer
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        resumes = trainer.state.fn == TrainerFn.FITTING
        check_restored(checkpoint, self.card, self.model, resumes, averages)
        self.calibration = checkpoint[KEY].get("calibration", {})
        self.undivided = resumes and has_older_groups(checkpoint, self.model, self.options.weight_decay)
