"""The model that is trained or evaluated, from its options: built, quantized, and described by a card."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from qat.checkpoint import Card, load_into
from qat.errors import QatError
from qat.models import build_float, default_preprocessing
from qat.models.arch import find_architecture
from qat.preprocessing import Preprocessing
from qat.recipe import Recipe, build_recipe
from qat.sites.insert import quantize, quantizers
from qat.training.options import ModelOptions


class Student(NamedTuple):
    """A model and what is known about it."""

    model: nn.Module
    card: Card
    calibration: dict[str, Any]  # how its checkpoint was calibrated; empty without one
    uncompiled: Counter[str]  # with ``compile``: quantizers that stay eager, counted by the name of their spec


def build_student(options: ModelOptions) -> Student:
    """Build and quantize the model that the options describe, with the weights that they name.

    Raises:
        QatError: an option that does not fit; where possible, before a model is built or downloaded.
    """
    if options.arch is None:
        raise QatError("model.arch is not set: give the name of a timm model, such as deit_tiny_patch16_224")
    table = build_recipe(options.recipe, options.rules or [], options.w_bits, options.a_bits, options.trust)
    preprocessing = default_preprocessing(options.arch, options.model_args).override(options.preprocessing or {})
    if options.compile and not table:
        raise QatError("model.compile compiles the quantizers, and the recipe has none: leave it out")
    model = build_float(
        options.arch,
        None if options.quant_checkpoint else options.checkpoint,
        options.num_classes,
        {**(options.model_args or {}), "drop_path_rate": options.drop_path},
        options.fresh_head,
        options.checkpoint_key,
    )
    card = _card_of(options, int(model.num_classes), table, preprocessing)  # type: ignore[arg-type]
    if table:
        model = quantize(model, table)
    uncompiled = compile_quantizers(model) if options.compile else Counter()
    calibration: dict[str, Any] = {}
    if options.quant_checkpoint is not None:
        calibration = load_into(model, card, options.quant_checkpoint, options.trust)
    return Student(model, card, calibration, uncompiled)


def _card_of(options: ModelOptions, outputs: int, table: Recipe, preprocessing: Preprocessing) -> Card:
    """The card of a model, checked as its readers will; timm's name in it needs no folder and no repository again."""
    named = find_architecture(str(options.arch))
    arguments = {**named.model_args, **(options.model_args or {})}
    rules = [rule.to_dict() for rule in table]
    card = Card(named.name, arguments, outputs, rules, preprocessing.to_dict(), options.classes or [])
    return Card.from_dict(card.to_dict(), "model")


def compile_quantizers(model: nn.Module) -> Counter[str]:
    """Let every quantizer use compiled arithmetic; those that have none are counted by the name of their spec."""
    eager: Counter[str] = Counter()
    for _, quantizer in quantizers(model):
        if not quantizer.compile_():
            eager[type(quantizer.spec).__name__] += 1
    return eager
