"""The options of a model and of its training: what stands under ``model`` in a config. Nothing here loads Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qat.errors import QatError
from qat.model_args import check_model_args
from qat.preprocessing import check_partial
from qat.ranges import Range, Seed, check_fields
from qat.training.features import FeatureOptions
from qat.training.regularizers import Regularizer

Rate = Annotated[float, Range(above=0, high=1e30)]  # AdamW moves a weight by so much, and float32 ends at 3.4e38
Beta = Annotated[float, Range(0, below=1)]
Width = Annotated[int, Range(2, 16)]


@dataclass(frozen=True)
class ModelOptions:
    """A quantized timm model and how it is trained.

    Args:
        arch: timm model name, for example deit_tiny_patch16_224.
        checkpoint: float weights to start from: pretrained (those that timm names), a .safetensors, .pth or .ckpt
            file, or null for random weights.
        checkpoint_key: which table of weights is read, where a file holds several, for example model_ema; null takes
            averaged weights where there are some, and says so.
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
        compile: run the arithmetic of the quantizers through torch.compile: faster steps, after a minute or so of
            compilation. On a CPU the forward values are the same; gradients of steps are summed in another order.
        teacher: timm model whose outputs replace the labels; null trains on data.softlabels, or on labels.
        teacher_checkpoint: weights of the teacher: pretrained, a local file, or a checkpoint that qat fit wrote.
        features: what modules of the student have to give, beside the outputs: that of the teacher's. Null for none.
        regularizers: losses on the weights themselves, each a class with its options, for example
            [{class_path: BinRegularizer, init_args: {weight: 0.01}}].
        lr: peak learning rate of AdamW; it is not scaled by the batch.
        step_lr: peak learning rate of steps and offsets; lr when null. AdamW moves a parameter by up to its learning
            rate however small the parameter is, and an offset of softmax is about 0.002.
        min_lr: learning rate at the end of the cosine.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: weight decay of matrices; steps, offsets, biases, norms and embeddings are never decayed.
        betas: AdamW's betas.
        eps: AdamW's epsilon; it damps gradients that are not well above it.
        seed: fixes drop path and dropout, step by step; seed_everything, or 0, when not given.
        preprocessing: evaluation transform (size, resize, interpolation, mean, std); timm's for arch when null.
            The command line takes it from data.preprocessing.
        classes: class names in label order, kept in the checkpoint. The command line takes them from the data.
        trust: quantizers that a checkpoint or the file of a recipe names by a dotted path may be imported. The command
            line takes it from --trust.
    """

    arch: str | None = None
    checkpoint: str | None = "pretrained"
    checkpoint_key: str | None = None
    num_classes: Annotated[int, Range(2, 1_000_000)] | None = None
    model_args: dict[str, Any] | None = None
    fresh_head: bool = False
    quant_checkpoint: Path | None = None
    drop_path: Annotated[float, Range(0, below=1)] = 0.0
    recipe: str = "float"
    rules: list[dict[str, Any]] | None = None
    w_bits: Width | None = None
    a_bits: Width | None = None
    compile: bool = False
    teacher: str | None = None
    teacher_checkpoint: str = "pretrained"
    features: FeatureOptions | None = None
    regularizers: list[Regularizer] | None = None
    lr: Rate = 5e-4
    step_lr: Rate | None = None
    min_lr: Annotated[float, Range(0)] = 0.0
    warmup_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    weight_decay: Annotated[float, Range(0, 1_000_000)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Range(above=0, high=1)] = 1e-8
    seed: Seed | None = None
    preprocessing: dict[str, Any] | None = None
    classes: list[str] | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        if self.min_lr > self.lr:
            raise QatError(f"model.min_lr is {self.min_lr}, above model.lr {self.lr}: the cosine leads down to it")
        check_model_args(self.model_args or {})
        check_partial(self.preprocessing or {}, "model.preprocessing.")
