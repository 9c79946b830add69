"""The quantizers of a VVTQ file: which there are, their widths, steps and offsets."""

from __future__ import annotations

import logging
from collections.abc import Collection
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from qat.errors import QatError
from qat.official.family import Family, Places, Table
from qat.official.source import OWN

log = logging.getLogger(__name__)

ReductionBits = Literal["8", "trained"]
MIN_BITS, SLOTS = 2, OWN["alpha"]
MAX_BITS = MIN_BITS + SLOTS - 1
MIN_STEP = 1e-4  # VVTQ clamps its steps to this: a step that lies on it was never set, or has collapsed
PROBS, GELU = ".attn.probs_quant", ".mlp.fc2.input_quant"  # the unsigned ones


def own_tensors(places: Places, offsets: Collection[str], unused: Collection[str]) -> dict[str, Tensor]:
    """What the quantizers own, without values."""
    owners = [(q, site in offsets) for site, qs in places.items() for q in qs] + [(q, False) for q in unused]
    lengths = [(q, {**OWN, "beta": SLOTS} if offset else OWN) for q, offset in owners]
    return {f"{q}.{name}": torch.empty(n, device="meta") for q, own in lengths for name, n in own.items()}


def refuse_other_builds(table: Table) -> None:
    """Raise QatError for a model of VVTQ that is not quantized, or by heads."""
    for name in (name for name in table if name.endswith(".nbits")):
        if (bits := table[name].flatten().tolist()) == [-1] or len(bits) != 1:
            raise QatError(f"{name!r} is {bits}, a float (-1) or head-wise (several) build: give a per-tensor model")


def refuse_used(table: Table, unused: Collection[str]) -> None:
    """Raise QatError for a quantizer that the network calls, against what is known of it."""
    for q in unused:
        for name, value in (("init_state", 0), ("nbits", 8), ("alpha", 0)):
            if (table[f"{q}.{name}"] != value).any():
                found = table[f"{q}.{name}"].tolist()
                raise QatError(f"'{q}.{name}' is {found}, not {value}: VVTQ never calls this quantizer; give its file")


def find_offsets(table: Table, places: Places, family: Family) -> set[str]:
    """The sites with an offset: those after GELU, or all that VVTQ's ``--use-offset`` reaches."""
    gelu = {site for site in places if site.endswith(GELU)}
    every = {site for site in places if _takes_offset(site, family)}
    found = {name for name in table if name.endswith(".beta")}
    owners = {len(sites): [f"{places[site][0]}.beta" for site in sites] for sites in (gelu, every)}
    wanted = {n: {name for owner in betas for name in family.names(owner)} for n, betas in owners.items()}
    near = min(wanted, key=lambda n: len(wanted[n] ^ found))
    for name in sorted(wanted[near] ^ found):
        what, counts = "unexpected" if name in found else "missing", [len(names) for names in wanted.values()]
        raise QatError(f"{name!r} is {what}: {len(found)} offsets, not one of {counts}; give an unchanged file")
    return gelu if near == len(gelu) else every


def _takes_offset(site: str, family: Family) -> bool:
    """Not softmax, weights, or what comes into a stem or a pooling layer."""
    if site in family.outside:
        return site.startswith("head") and site.endswith(".input_quant")
    return not site.endswith((PROBS, ".weight_quant"))


def read_widths(table: Table, places: Places, family: Family, reduction_bits: ReductionBits) -> dict[str, int]:
    """The width of every site: one of all weights and one of all activations in the blocks, 8 outside."""
    widths: dict[str, int] = {}
    known = {"fixed": ("the first and last layer", 8)}
    for site, sources in places.items():
        if site in family.trained:
            widths[site] = _read_trained(table, sources[0], reduction_bits)
            continue
        kind = "fixed" if site in family.outside else "weight" if site.endswith(".weight_quant") else "activation"
        for q in sources:
            bits = table[f"{q}.nbits"].item()
            if bits not in range(MIN_BITS, MAX_BITS + 1):
                raise QatError(f"'{q}.nbits' is {bits:g}: only integers 2 to 8 are converted")
            where, widths[site] = known.setdefault(kind, (q, int(bits)))
            if bits != widths[site]:
                raise QatError(f"'{q}.nbits' is {bits:g}, but {where} has {widths[site]}: give a model of one width")
    return widths


def _read_trained(table: Table, q: str, reduction_bits: ReductionBits) -> int:
    """A width that was a parameter, and rounded in every forward pass."""
    bits = table[f"{q}.nbits"].item()
    if not isfinite(bits):
        raise QatError(f"'{q}.nbits' is {bits}: the training had diverged, give an earlier file")
    width = round(min(max(bits, MIN_BITS), MAX_BITS))
    if bits != 8 and reduction_bits != "trained":
        raise QatError(
            f"'{q}.nbits' is {bits:g}, which VVTQ trained from 8 by accident, and its network computes with {width} "
            "bits there: convert it so with --reduction_bits trained"
        )
    if bits != 8:
        log.warning("%s.nbits is %g, trained from 8: converted with %d bits", q, bits, width)
    return width


def read_step(table: Table, q: str, slot: int) -> Tensor:
    """The live step, which must have been set."""
    state, step = table[f"{q}.init_state"].item(), table[f"{q}.alpha"][slot]
    if state != 1:
        raise QatError(f"'{q}.init_state' is {state:g}, not 1: the quantizer was never used; give a trained file")
    if not MIN_STEP < step.item() < float("inf"):
        what = f"'{q}.alpha[{slot}]' is {step.item():g}, and a trained step is finite and above {MIN_STEP:g}"
        raise QatError(f"{what}: never set, or collapsed; give a trained file")
    return step
