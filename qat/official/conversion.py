"""Convert a table of official weights to one of ours; a quantized model also gets the card that describes it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.checkpoint import Card
from qat.errors import QatError
from qat.models.loading import load_strictly
from qat.official.layout import OfficialLayout, Places, Table
from qat.official.steps import (
    GELU,
    MIN_BITS,
    PROBS,
    ReductionBits,
    find_offsets,
    own_tensors,
    read_step,
    read_widths,
    refuse_other_builds,
    refuse_used,
)
from qat.official.table import OfficialTable, identify
from qat.preprocessing import Preprocessing
from qat.quantizers import LSQ
from qat.recipe import build_recipe
from qat.sites.insert import quantizers

log = logging.getLogger(__name__)

VVTQ_PREPROCESSING = Preprocessing(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LEARNED_OFFSET = {"bits": "a_bits", "offset": True, "grad_scale": "numel", "init": "mse"}
MERGING_WEIGHT = {"grad_scale": "l1", "init": "mse"}
WITH_OFFSETS = [  # rules for the sites that have an offset only if VVTQ was trained with --use-offset
    {"match": "*.attn.*.input_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED_OFFSET}},
    {"match": "*.attn.[qkv]_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED_OFFSET}},
    {"match": "*.mlp.fc1.input_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED_OFFSET}},
    {"match": "head*.input_quant", "spec": {"class_path": "LSQ", "init_args": {**LEARNED_OFFSET, "bits": 8}}},
]


@dataclass(frozen=True)
class Converted:
    """A converted model.

    Args:
        arch: timm name of the model.
        state: weights, steps and offsets under our names.
        card: describes a quantized model; None for a float one.
    """

    arch: str
    state: dict[str, Tensor]
    card: Card | None = None


def convert(
    table: Table,
    arch: str | None = None,
    classes: Sequence[str] = (),
    model_args: Mapping[str, Any] | None = None,
    reduction_bits: ReductionBits = "8",
) -> Converted:
    """Convert float weights of DeiT, Swin or SReT-T, official or in the layout of VVTQ, or a quantized model of VVTQ.

    Args:
        table: names and tensors of the file, without the prefix ``module.``.
        arch: timm name of the model; inferred from names and sizes when None.
        classes: class names in label order, kept on the card of a quantized model whose head has as many outputs.
        model_args: further arguments of the timm constructor for a quantized model, also kept on its card, for example
            ``eval_permutation`` of SReT.
        reduction_bits: width of the weights that merge patches in a quantized Swin: ``8`` refuses every other width,
            ``trained`` keeps the one in the file, rounded as VVTQ's network rounds it.

    Raises:
        QatError: naming the first key that is missing, unexpected or wrong.
    """
    official = identify(table, arch)
    if official.quantized:
        return _convert_quantized(official, classes, dict(model_args or {}), reduction_bits)
    if model_args or reduction_bits != "8":
        given = f"model_args {dict(model_args)}" if model_args else f"reduction_bits {reduction_bits!r}"
        raise QatError(f"{given} is for a quantized model, but these weights are float: leave it out here")
    return _convert_float(official)


def _convert_float(official: OfficialTable) -> Converted:
    official.check({})
    if remark := official.layout.remark(official.split):
        log.warning(remark)
    return Converted(official.arch, official.fuse())


def _convert_quantized(
    official: OfficialTable, classes: Sequence[str], model_args: dict[str, Any], reduction_bits: ReductionBits
) -> Converted:
    table, layout, known = official.table, official.layout, official.layout.archs.values()
    if official.arch not in known:
        raise QatError(f"arch is {official.arch!r}: quantized files are converted for {', '.join(known)}")
    if reduction_bits != "8" and not layout.trained:
        raise QatError(f"reduction_bits is {reduction_bits!r}, but {official.arch} merges no patches: leave it out")
    refuse_other_builds(table)
    places = layout.places(official.weights)
    offsets = find_offsets(table, places, layout)
    official.check(own_tensors(places, offsets, layout.unused))
    refuse_used(table, layout.unused)
    widths = read_widths(table, places, layout, reduction_bits)
    state = official.fuse() | _read_steps(table, places, widths, offsets)
    rules = _rules(layout, widths, offsets)
    names = list(classes) if len(classes) == official.outputs else []
    if classes and not names:
        log.warning("the head has %d outputs, whose names are not known: %d were given", official.outputs, len(classes))
    card = Card(official.arch, model_args, official.outputs, rules, VVTQ_PREPROCESSING.to_dict(), names)
    _check_card(card, state, widths, offsets)
    return Converted(official.arch, state, card)


def _read_steps(table: Table, places: Places, widths: Mapping[str, int], offsets: Collection[str]) -> dict[str, Tensor]:
    """Steps and offsets in the slots that the widths select, under our names."""
    state = {}
    for site, width in widths.items():
        slot = width - MIN_BITS
        state[f"{site}.step"] = torch.stack([read_step(table, q, slot) for q in places[site]])
        if site in offsets:
            state[f"{site}.offset"] = table[f"{places[site][0]}.beta"][slot : slot + 1].clone()
    return state


def _rules(layout: OfficialLayout, widths: Mapping[str, int], offsets: Collection[str]) -> list[dict[str, Any]]:
    """Recipe ``vvtq`` with the widths and offsets of the file."""
    w_bits, a_bits = (_width(widths, f".mlp.fc1.{kind}_quant") for kind in ("weight", "input"))
    offset_rules = [] if all(site.endswith(GELU) for site in offsets) else WITH_OFFSETS
    trained = [
        {"match": site, "spec": {"class_path": "LSQ", "init_args": {**MERGING_WEIGHT, "bits": widths[site]}}}
        for site in layout.trained
        if widths[site] != 8
    ]
    return [rule.to_dict() for rule in build_recipe("vvtq", [*offset_rules, *layout.rules, *trained], w_bits, a_bits)]


def _width(widths: Mapping[str, int], end: str) -> int:
    return next(width for site, width in widths.items() if site.endswith(end))


def _check_card(card: Card, state: Table, widths: Mapping[str, int], offsets: Collection[str]) -> None:
    """Raise QatError where the card and VVTQ's own list of sites differ; only a changed recipe can cause that."""
    with torch.device("meta"):
        model = card.build()
    specs = {name: quantizer.spec for name, quantizer in quantizers(model)}
    for site in sorted(specs.keys() | widths.keys()):
        spec, wanted = specs.get(site), (widths.get(site), not site.endswith((PROBS, GELU)), site in offsets)
        if not isinstance(spec, LSQ) or wanted != (spec.width, spec.signed, spec.offset):
            raise QatError(f"{site!r} is {spec} in recipe 'vvtq', but VVTQ has {wanted} there: restore the recipe")
    load_strictly(model.to_empty(device="cpu"), state, "the converted table")
