"""Weights of official DeiT and VVTQ files, translated to our names and shapes.

VVTQ (arXiv 2307.00331) has three projections where timm has one, and each of its quantizers q owns up to four tensors:

    q.nbits (1,)        the width b
    q.alpha (7,)        a step for each width 2..8; the step is alpha[b - 2], the others are dead
    q.beta (7,)         offsets likewise, in units of the input, at some activations only
    q.init_state (1,)   1 once the step is set

The quantizer of a weight is named as its layer. A file states neither model nor signs: those follow from the names.
Nothing is guessed: one name too many or too few, another shape, type or width stops the conversion.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.checkpoint import Card
from qat.errors import QatError
from qat.insert import quantizers
from qat.models import build_float
from qat.models.build import load_strictly
from qat.preprocessing import Preprocessing
from qat.quantizers import LSQ
from qat.recipe import build_recipe

log = logging.getLogger(__name__)

Table = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Places = dict[str, tuple[str, ...]]  # site -> the quantizers of VVTQ that give its steps

ARCHS = {(192, 12): "deit_tiny_patch16_224", (384, 12): "deit_small_patch16_224", (768, 12): "deit_base_patch16_224"}
MIN_BITS, SLOTS = 2, 7
OWN = {"nbits": 1, "alpha": SLOTS, "init_state": 1}  # lengths
MIN_STEP = 1e-4  # VVTQ clamps its steps to this: a step that lies on it was never set, or has collapsed
PREPROCESSING = Preprocessing(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

SPLIT = ("proj_q", "proj_k", "proj_v")  # rows of timm's qkv, in this order
BLOCK: Places = {
    "attn.qkv.input_quant": ("attn.quant_input",),
    "attn.qkv.weight_quant": tuple(f"attn.{name}" for name in SPLIT),
    "attn.q_quant": ("attn.quant_q",),
    "attn.k_quant": ("attn.quant_k",),
    "attn.v_quant": ("attn.quant_v",),
    "attn.probs_quant": ("attn.quant_attn",),
    "attn.proj.input_quant": ("attn.quant_output",),  # there before the heads are merged: one step cannot tell
    "attn.proj.weight_quant": ("attn.proj",),
    "mlp.fc1.input_quant": ("mlp.quant1",),
    "mlp.fc1.weight_quant": ("mlp.fc1",),
    "mlp.fc2.input_quant": ("mlp.quant2",),
    "mlp.fc2.weight_quant": ("mlp.fc2",),
}
OUTSIDE: Places = {  # always 8 bits
    "patch_embed.proj.input_quant": ("patch_embed.quant",),
    "patch_embed.proj.weight_quant": ("patch_embed.proj",),
    "head.input_quant": ("quant",),
    "head.weight_quant": ("head",),
}
PROBS, GELU = ".attn.probs_quant", ".mlp.fc2.input_quant"  # the unsigned ones
NEVER_OFFSET = (PROBS, "patch_embed.proj.input_quant", ".weight_quant")
LEARNED = {"bits": "a_bits", "offset": True, "grad_scale": "numel", "init": "mse"}
SWITCHED = [  # rules for what has an offset too where VVTQ was trained with --use-offset
    {"match": "blocks.*.attn.*.input_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED}},
    {"match": "blocks.*.attn.[qkv]_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED}},
    {"match": "blocks.*.mlp.fc1.input_quant", "spec": {"class_path": "LSQ", "init_args": LEARNED}},
    {"match": "head.input_quant", "spec": {"class_path": "LSQ", "init_args": {**LEARNED, "bits": 8}}},
]


@dataclass(frozen=True)
class Converted:
    """Weights with our names; ``card`` describes the quantised model and is None for a float one."""

    arch: str
    state: dict[str, Tensor]
    card: Card | None = None


def convert(table: Table, arch: str | None = None, classes: Sequence[str] = ()) -> Converted:
    """Translate a float DeiT, official or in the layout of VVTQ, or a quantised VVTQ DeiT.

    Args:
        table: names and tensors of the file, without the prefix ``module.``.
        arch: timm name of the model; told by width and depth when None.
        classes: class names in label order, kept on the card of a quantised model.

    Raises:
        QatError: naming the first key that is missing, unexpected or wrong.
    """
    split = _is_split(table)
    arch = arch or _tell_arch(table)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in build_float(arch, None).state_dict().items()}
    if any(name.rpartition(".")[2] in OWN for name in table):
        return _convert_quantised(table, arch, shapes, classes)
    _check_table(table, _split(shapes) if split else shapes)
    if split:
        log.warning(
            "VVTQ's float training clamps GELU outputs to at most 1, timm's model does not, and names cannot tell "
            "whether these weights were trained so: measure them (--model.recipe float) before you train from them"
        )
    return Converted(arch, _fuse(table, shapes))


def _convert_quantised(table: Table, arch: str, shapes: Shapes, classes: Sequence[str]) -> Converted:
    if arch not in ARCHS.values():
        raise QatError(f"arch is {arch!r}: quantised files are converted for {', '.join(ARCHS.values())}")
    _refuse_other_builds(table)
    places = _places(shapes)
    offsets = _find_offsets(table, places)
    _check_table(table, _split(shapes) | _own_shapes(places, offsets))
    widths = _read_widths(table, places)
    state = _fuse(table, shapes)
    for site, width in widths.items():
        slot = width - MIN_BITS
        state[f"{site}.step"] = torch.stack([_step(table, q, slot) for q in places[site]])
        if site in offsets:
            state[f"{site}.offset"] = table[f"{places[site][0]}.beta"][slot : slot + 1].clone()
    w_bits, a_bits = widths["blocks.0.mlp.fc1.weight_quant"], widths["blocks.0.mlp.fc1.input_quant"]
    switched = SWITCHED if "head.input_quant" in offsets else ()
    rules = [rule.to_dict() for rule in build_recipe("vvtq", switched, w_bits, a_bits)]
    card = Card(arch, {}, shapes["head.weight"][0], rules, PREPROCESSING.to_dict(), list(classes))
    model = card.build()
    _check_specs(model, widths, offsets)
    load_strictly(model, state, "the converted table")
    return Converted(arch, state, card)


def _is_split(table: Table) -> bool:
    """Whether q, k and v have projections of their own."""
    fused, split = (next((n for n in table if f".attn.{part}." in n), None) for part in ("qkv", "proj_q"))
    if fused and split:
        raise QatError(f"{fused!r} is a fused projection and {split!r} a split one: give the table of one model")
    if not fused and not split:
        raise QatError(f"no name has 'attn.qkv' or 'attn.proj_q', the first is {next(iter(table), '')!r}: give a DeiT")
    return split is not None


def _tell_arch(table: Table) -> str:
    width = table["cls_token"].numel() if "cls_token" in table else 0
    depth = len({name.split(".")[1] for name in table if name.startswith("blocks.")})
    if (width, depth) not in ARCHS:
        raise QatError(f"width {width} and depth {depth} (cls_token, blocks) tell no DeiT: give its timm name (--arch)")
    return ARCHS[width, depth]


def _check_table(table: Table, shapes: Shapes) -> None:
    """Names, shapes and types are exactly these, and the weights are finite."""
    missing, extra = [name for name in shapes if name not in table], [name for name in table if name not in shapes]
    if missing or extra:
        what = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is unexpected"
        counts = f"{len(table)} names, {len(missing)} missing and {len(extra)} unexpected"
        raise QatError(f"{what} ({counts}): give an official file, or its timm name (--arch)")
    for name, shape in shapes.items():
        value = table[name]
        found, wanted = f"{tuple(value.shape)} {value.dtype}", f"{shape} {torch.float32}"
        if found != wanted:
            raise QatError(f"{name!r} is {found}, not {wanted}: give an official file, or its timm name (--arch)")
        if name.rpartition(".")[2] not in OWN and not torch.isfinite(value).all():
            raise QatError(f"{name!r} is not finite: the training had diverged, give an earlier file")


def _split(shapes: Shapes) -> Shapes:
    """Timm's shapes, with three projections for each fused one."""
    out: Shapes = {}
    for name, shape in shapes.items():
        fused = ".attn.qkv." in name
        out |= {name.replace("qkv", part): (shape[0] // 3, *shape[1:]) for part in SPLIT} if fused else {name: shape}
    return out


def _own_shapes(places: Places, offsets: set[str]) -> Shapes:
    """Shapes of the tensors that the quantizers own."""
    own = [(q, {**OWN, "beta": SLOTS} if site in offsets else OWN) for site, qs in places.items() for q in qs]
    return {f"{q}.{name}": (length,) for q, lengths in own for name, length in lengths.items()}


def _fuse(table: Table, shapes: Shapes) -> dict[str, Tensor]:
    """The weights with timm's names, rows of q, k and v in this order; copies, which no other tensor shares."""
    parts = {name: [name.replace("qkv", part) for part in SPLIT] for name in shapes if name not in table}
    return {name: torch.cat([table[part] for part in parts.get(name, [name])]) for name in shapes}


def _places(shapes: Shapes) -> Places:
    """The table of sites for every block."""
    blocks = dict.fromkeys(name.split(".")[1] for name in shapes if name.startswith("blocks."))
    pairs = [(f"blocks.{i}.", site, sources) for i in blocks for site, sources in BLOCK.items()]
    return OUTSIDE | {block + site: tuple(block + q for q in sources) for block, site, sources in pairs}


def _refuse_other_builds(table: Table) -> None:
    for name in (name for name in table if name.endswith(".nbits")):
        if (bits := table[name].flatten().tolist()) == [-1] or len(bits) != 1:
            raise QatError(f"{name!r} is {bits}, a float (-1) or head-wise (several) build: give a per-tensor model")


def _find_offsets(table: Table, places: Places) -> set[str]:
    """The sites with an offset: those after GELU, or all that VVTQ's ``--use-offset`` reaches."""
    gelu = {site for site in places if site.endswith(GELU)}
    every = {site for site in places if not site.endswith(NEVER_OFFSET)}
    found = {name for name in table if name.endswith(".beta")}
    wanted = {len(sites): {f"{places[site][0]}.beta" for site in sites} for sites in (gelu, every)}
    near = min(wanted, key=lambda count: len(wanted[count] ^ found))
    for name in sorted(wanted[near] ^ found):
        what = "unexpected" if name in found else "missing"
        raise QatError(f"{name!r} is {what}: {len(found)} offsets, not one of {[*wanted]}; give an unchanged file")
    return gelu if near == len(gelu) else every


def _read_widths(table: Table, places: Places) -> dict[str, int]:
    """The width of every site: one of all weights and one of all activations in the blocks, 8 outside."""
    widths: dict[str, int] = {}
    known = {"fixed": ("the first and last layer", 8)}
    for site, sources in places.items():
        kind = "fixed" if site in OUTSIDE else "weight" if site.endswith(".weight_quant") else "activation"
        for q in sources:
            bits = table[f"{q}.nbits"].item()
            if bits not in range(MIN_BITS, MIN_BITS + SLOTS):
                raise QatError(f"'{q}.nbits' is {bits:g}: only integers 2 to 8 are converted")
            where, widths[site] = known.setdefault(kind, (q, int(bits)))
            if bits != widths[site]:
                raise QatError(f"'{q}.nbits' is {bits:g}, but {where} has {widths[site]}: give a model of one width")
    return widths


def _check_specs(model: nn.Module, widths: Mapping[str, int], offsets: set[str]) -> None:
    """QatError where recipe ``vvtq`` and VVTQ's own table of sites differ, which only a changed recipe can cause."""
    specs = {name: quantizer.spec for name, quantizer in quantizers(model)}
    for site in sorted(specs.keys() | widths.keys()):
        spec, wanted = specs.get(site), (widths.get(site), not site.endswith((PROBS, GELU)), site in offsets)
        if not isinstance(spec, LSQ) or wanted != (spec.width, spec.signed, spec.offset):
            raise QatError(f"{site!r} is {spec} in recipe 'vvtq', but VVTQ has {wanted} there: restore the recipe")


def _step(table: Table, q: str, slot: int) -> Tensor:
    """The live step, which must have been set."""
    state, step = table[f"{q}.init_state"].item(), table[f"{q}.alpha"][slot]
    if state != 1:
        raise QatError(f"'{q}.init_state' is {state:g}, not 1: the quantizer was never used; give a trained file")
    if not MIN_STEP < step.item() < float("inf"):
        what = f"'{q}.alpha[{slot}]' is {step.item():g}, and a trained step is finite and above {MIN_STEP:g}"
        raise QatError(f"{what}: never set, or collapsed; give a trained file")
    return step
