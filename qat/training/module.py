"""The training module: a quantized timm model, its losses, its optimizer. No quantization arithmetic.

Shapes: B crops in a step, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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

from qat.checkpoint import KEY, Card, check_restored, load_into
from qat.data.images import Batch, TopK
from qat.data.streams import rng_for
from qat.errors import QatError
from qat.models import build_float, default_preprocessing, param_groups, regroup
from qat.recipe import build_recipe
from qat.sites.insert import quantize, quantizers, raise_for_uncalibrated
from qat.training.finite import FiniteCheck
from qat.training.length import total_steps
from qat.training.losses import cross_entropy, entropy
from qat.training.regularizers import Regularizer, named
from qat.training.schedules import cosine_with_warmup
from qat.training.teacher import build_teacher


class Prediction(NamedTuple):
    """What `predict_step` returns for a batch."""

    paths: tuple[str, ...]
    classes: Tensor  # (B, 5) int64, most probable first
    probs: Tensor  # (B, 5)


class QATModule(L.LightningModule):
    """Quantization-aware training of a timm model.

    Args:
        arch: timm model name, for example deit_tiny_patch16_224.
        checkpoint: float weights to start from: pretrained (those that timm names), a .safetensors, .pth or .ckpt
            file, or null for random weights.
        num_classes: outputs of the head; follows the data when null.
        model_args: further arguments of the timm constructor, for example {img_size: 384}.
        fresh_head: start from a random head instead of the one in the checkpoint.
        quant_checkpoint: checkpoint of a quantized model with the same recipe, such as the ptq.ckpt of a calibration:
            training starts from its weights and steps, in place of ``checkpoint`` and of a calibration.
        drop_path: stochastic depth rate of the last block, rising from 0 in the first.
        recipe: float, lsq, vvtq, one of post-training quantization (docs/ptq.md), or the path of a YAML file of rules.
        rules: rules appended to the recipe; the last rule that matches a site wins.
        w_bits: width of weights where the recipe says w_bits.
        a_bits: width of activations where the recipe says a_bits.
        compile: run the arithmetic of the quantizers through torch.compile: same values, faster steps, and a minute or
            so of compilation.
        teacher: timm model whose outputs replace the labels; null trains on data.softlabels, or on labels.
        teacher_checkpoint: weights of the teacher: pretrained, a local file, or a checkpoint of a run.
        regularizers: losses on the weights themselves, each a class with its options, for example
            [{class_path: BinRegularizer, init_args: {weight: 0.01}}].
        lr: peak learning rate of AdamW; it is not scaled by the batch.
        step_lr: peak learning rate of steps and offsets; lr when null. AdamW moves a parameter by up to its learning
            rate however small the parameter is, and an offset of softmax is about 0.002.
        min_lr: learning rate at the end of the cosine.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: of weight matrices; steps, offsets, biases, norms and embeddings are never decayed.
        betas: of AdamW.
        eps: of AdamW; it damps gradients that are not well above it.
        seed: fixes drop path and dropout, step by step; seed_everything, or 0, when not given.
        preprocessing: evaluation transform (size, resize, interpolation, mean, std); timm's for arch when null.
            The command line takes it from data.preprocessing.
        classes: class names in label order, kept in the checkpoint. The command line takes them from the data.
    """

    def __init__(
        self,
        arch: str | None = None,
        checkpoint: str | None = "pretrained",
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        fresh_head: bool = False,
        quant_checkpoint: Path | None = None,
        drop_path: float = 0.0,
        recipe: str = "float",
        rules: list[dict[str, Any]] | None = None,
        w_bits: int | None = None,
        a_bits: int | None = None,
        compile: bool = False,
        teacher: str | None = None,
        teacher_checkpoint: str = "pretrained",
        regularizers: list[Regularizer] | None = None,
        lr: float = 5e-4,
        step_lr: float | None = None,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int | None = None,
        preprocessing: dict[str, Any] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("step_lr", lr if step_lr is None else step_lr)):
            if not value > 0:
                raise QatError(f"model.{name} is {value}: it must be positive")
        if arch is None:
            raise QatError("model.arch is not set: give the name of a timm model, such as deit_tiny_patch16_224")
        table = build_recipe(recipe, rules or [], w_bits, a_bits)  # before any model is built or downloaded
        self.preprocessing = default_preprocessing(arch, model_args).override(preprocessing or {})
        self.lr, self.min_lr, self.warmup_steps = lr, min_lr, warmup_steps
        self.step_lr = lr if step_lr is None else step_lr
        self.weight_decay, self.betas, self.eps, self.seed = weight_decay, betas, eps, seed or 0
        self.total = 0  # optimizer steps of the run
        self.options: dict[str, Any] = {}  # of the whole run, kept in the checkpoint; the command line fills it
        self.calibration: dict[str, Any] = {}  # what the callback of that name did
        model = build_float(
            arch,
            None if quant_checkpoint else checkpoint,
            num_classes,
            {**(model_args or {}), "drop_path_rate": drop_path},
            fresh_head,
        )
        self.model = quantize(model, table) if table else model
        if compile and not table:
            raise QatError("model.compile compiles the quantizers, and the recipe has none: leave it out")
        for _, quantizer in quantizers(self.model) if compile else ():
            quantizer.compile_()
        self.regularizers = named(regularizers or [])
        for regularizer in self.regularizers.values():
            regularizer.choose(self.model)  # QatError, before training, when it matches nothing
        outputs = int(model.num_classes)  # type: ignore[arg-type]
        rules_out = [rule.to_dict() for rule in table]
        self.card = Card(arch, model_args or {}, outputs, rules_out, self.preprocessing.to_dict(), classes or [])
        if quant_checkpoint is not None:
            self.calibration = load_into(self.model, self.card, quant_checkpoint)
        # not a submodule: a teacher has no place in the checkpoint or the optimizer
        self.teacher = (build_teacher(teacher, teacher_checkpoint, outputs, classes),) if teacher else ()
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
        rng = rng_for(self.seed, self.current_epoch, batch_idx * self.trainer.world_size + self.global_rank)
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
        regroup(optimizer, config.scheduler, self.groups(), betas=self.betas, eps=self.eps)

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
        optimizer = AdamW(self.groups(), lr=self.lr, betas=self.betas, eps=self.eps)
        floor = self.min_lr / self.lr
        schedule = LambdaLR(optimizer, lambda step: cosine_with_warmup(step, self.total, self.warmup_steps, floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rate and weight decay."""
        return param_groups(self.model, self.weight_decay, self.lr, self.step_lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add card and options; QatError rather than overwrite a good checkpoint with weights that are not finite."""
        for name, value in self.model.state_dict().items():
            if not torch.isfinite(value).all():
                raise QatError(f"{name} is not finite at step {self.global_step}; the last good checkpoint is kept")
        told = {key: value for key, value in self.calibration.items() if key != "snr_db" or self.global_step == 0}
        checkpoint[KEY] = self.card.to_dict() | {"options": self.options, "calibration": told}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """QatError when the checkpoint describes another model, or a run that cannot go on as it is now."""
        trainer: L.Trainer = self.trainer
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        check_restored(checkpoint, self.card, fits=trainer.state.fn == TrainerFn.FITTING, averages=averages)
        self.calibration = checkpoint[KEY].get("calibration", {})
