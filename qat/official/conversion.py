"""From a table of official weights to one of ours, with a card if the model is quantized."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.checkpoint import Card
from qat.errors import QatError
from qat.models.build import load_strictly
from qat.official.family import Family, Places, Table
from qat.official.source import Source, identify
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
from qat.preprocessing import Preprocessing
from qat.quantizers import LSQ
from qat.recipe import build_recipe
from qat.sites.insert import quantizers

log = logging.getLogger(__name__)

PREPROCESSING = Preprocessing(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LEARNED = {"bits": "a_bits", "offset": True, "grad_scale": "numel", "init": "mse"}
MERGING = {"grad_scale": "l1", "init": "mse"}
SWITCHED = [  # rules for what has an offset too where VVTQ was trained with --use-offset
    {"match": "*.attn.*.input_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED}},
    {"match": "*.attn.[qkv]_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED}},
    {"match": "*.mlp.fc1.input_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED}},
    {"match": "head*.input_quant", "spec": {"class_path": "LSQ", "init_args": {**LEARNED, "bits": 8}}},
]


@dataclass(frozen=True)
class Converted:
    """Weights with our names; ``card`` describes the quantized model and is None for a float one."""

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
    """Translate a float DeiT, Swin or SReT-T, official or in the layout of VVTQ, or a quantized one of VVTQ.

    Args:
        table: names and tensors of the file, without the prefix ``module.``.
        arch: timm name of the model; told by names and sizes when None.
        classes: class names in label order, kept on the card of a quantized model.
        model_args: further arguments of the timm constructor, kept likewise, for example ``eval_permutation`` of SReT.
        reduction_bits: of the weights that merge patches in a quantized Swin: ``8``, and another width is refused, or
            ``trained``, the width in the file, rounded as its network rounds it.

    Raises:
        QatError: naming the first key that is missing, unexpected or wrong.
    """
    source = identify(table, arch)
    if source.quantized:
        return _convert_quantized(source, classes, dict(model_args or {}), reduction_bits)
    if model_args or reduction_bits != "8":
        given = f"model_args {dict(model_args)}" if model_args else f"reduction_bits {reduction_bits!r}"
        raise QatError(f"{given} is kept with a quantized model, but these weights are float: leave it out here")
    return _convert_float(source)


def _convert_float(source: Source) -> Converted:
    source.check({})
    if remark := source.family.remark(source.split):
        log.warning(remark)
    return Converted(source.arch, source.fuse())


def _convert_quantized(
    source: Source, classes: Sequence[str], model_args: dict[str, Any], reduction_bits: ReductionBits
) -> Converted:
    table, family, known = source.table, source.family, source.family.archs.values()
    if source.arch not in known:
        raise QatError(f"arch is {source.arch!r}: quantized files are converted for {', '.join(known)}")
    if reduction_bits != "8" and not family.trained:
        raise QatError(f"reduction_bits is {reduction_bits!r}, but {source.arch} merges no patches: leave it out")
    refuse_other_builds(table)
    places = family.places(source.weights)
    offsets = find_offsets(table, places, family)
    source.check(own_tensors(places, offsets, family.unused))
    refuse_used(table, family.unused)
    widths = read_widths(table, places, family, reduction_bits)
    state = source.fuse() | _read_steps(table, places, widths, offsets)
    rules = _rules(family, widths, offsets)
    card = Card(source.arch, model_args, source.outputs, rules, PREPROCESSING.to_dict(), list(classes))
    _check_card(card, state, widths, offsets)
    return Converted(source.arch, state, card)


def _read_steps(table: Table, places: Places, widths: Mapping[str, int], offsets: Collection[str]) -> dict[str, Tensor]:
    """The live steps and offsets, with our names."""
    state = {}
    for site, width in widths.items():
        slot = width - MIN_BITS
        state[f"{site}.step"] = torch.stack([read_step(table, q, slot) for q in places[site]])
        if site in offsets:
            state[f"{site}.offset"] = table[f"{places[site][0]}.beta"][slot : slot + 1].clone()
    return state


def _rules(family: Family, widths: Mapping[str, int], offsets: Collection[str]) -> list[dict[str, Any]]:
    """Recipe ``vvtq`` as it was in the file."""
    w_bits, a_bits = (_width(widths, f".mlp.fc1.{kind}_quant") for kind in ("weight", "input"))
    switched = [] if all(site.endswith(GELU) for site in offsets) else SWITCHED
    trained = [
        {"match": site, "spec": {"class_path": "LSQ", "init_args": {**MERGING, "bits": widths[site]}}}
        for site in family.trained
        if widths[site] != 8
    ]
    return [rule.to_dict() for rule in build_recipe("vvtq", [*switched, *family.rules, *trained], w_bits, a_bits)]


def _width(widths: Mapping[str, int], end: str) -> int:
    return next(width for site, width in widths.items() if site.endswith(end))


def _check_card(card: Card, state: Table, widths: Mapping[str, int], offsets: Collection[str]) -> None:
    """QatError where recipe ``vvtq`` and VVTQ's own table of sites differ, which only a changed recipe can cause."""
    with torch.device("meta"):
        model = card.build()
    specs = {name: quantizer.spec for name, quantizer in quantizers(model)}
    for site in sorted(specs.keys() | widths.keys()):
        spec, wanted = specs.get(site), (widths.get(site), not site.endswith((PROBS, GELU)), site in offsets)
        if not isinstance(spec, LSQ) or wanted != (spec.width, spec.signed, spec.offset):
            raise QatError(f"{site!r} is {spec} in recipe 'vvtq', but VVTQ has {wanted} there: restore the recipe")
    load_strictly(model.to_empty(device="cpu"), state, "the converted table")
