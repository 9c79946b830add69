"""The model that is trained or evaluated, from its options: built, quantized, and described by a card."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from qat.checkpoint import Card, load_into
from qat.errors import QatError
from qat.models import build_float, default_preprocessing
from qat.recipe import build_recipe
from qat.sites.insert import quantize, quantizers
from qat.training.options import ModelOptions


class Student(NamedTuple):
    """A model, what a checkpoint says of it, and what is known of its calibration."""

    model: nn.Module
    card: Card
    calibration: dict[str, Any]


def build_student(options: ModelOptions) -> Student:
    """Build and quantize the model that the options describe, with the weights that they name.

    Raises:
        QatError: an option that does not fit, before a model is built or downloaded where that can be known.
    """
    if options.arch is None:
        raise QatError("model.arch is not set: give the name of a timm model, such as deit_tiny_patch16_224")
    table = build_recipe(options.recipe, options.rules or [], options.w_bits, options.a_bits)
    preprocessing = default_preprocessing(options.arch, options.model_args).override(options.preprocessing or {})
    if options.compile and not table:
        raise QatError("model.compile compiles the quantizers, and the recipe has none: leave it out")
    model = build_float(
        options.arch,
        None if options.quant_checkpoint else options.checkpoint,
        options.num_classes,
        {**(options.model_args or {}), "drop_path_rate": options.drop_path},
        options.fresh_head,
    )
    outputs = int(model.num_classes)  # type: ignore[arg-type]
    card = Card(
        options.arch,
        options.model_args or {},
        outputs,
        [rule.to_dict() for rule in table],
        preprocessing.to_dict(),
        options.classes or [],
    )
    if table:
        model = quantize(model, table)
    for _, quantizer in quantizers(model) if options.compile else ():
        quantizer.compile_()
    found = load_into(model, card, options.quant_checkpoint) if options.quant_checkpoint is not None else {}
    return Student(model, card, found)
