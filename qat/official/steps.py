"""The widths, steps and offsets of the quantizers in a VVTQ file."""

from __future__ import annotations

import logging
from collections.abc import Collection
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from qat.errors import QatError
from qat.official.layout import OfficialLayout, Places, Table
from qat.official.table import LENGTHS

log = logging.getLogger(__name__)

ReductionBits = Literal["8", "trained"]
MIN_BITS, SLOTS = 2, LENGTHS["alpha"]
MAX_BITS = MIN_BITS + SLOTS - 1
MIN_STEP = 1e-4  # VVTQ clamps its steps to this: a step of this size was never set, or has collapsed
PROBS, GELU = ".attn.probs_quant", ".mlp.fc2.input_quant"  # the unsigned sites


def own_tensors(places: Places, offsets: Collection[str], unused: Collection[str]) -> dict[str, Tensor]:
    """Names and shapes of the tensors that the quantizers own, on the device ``meta``."""
    owners = [(q, site in offsets) for site, qs in places.items() for q in qs] + [(q, False) for q in unused]
    lengths = [(q, {**LENGTHS, "beta": SLOTS} if offset else LENGTHS) for q, offset in owners]
    return {f"{q}.{name}": torch.empty(n, device="meta") for q, own in lengths for name, n in own.items()}


def refuse_other_builds(table: Table) -> None:
    """Raise QatError for a VVTQ model that is float, or that has one width for each head."""
    for name in (name for name in table if name.endswith(".nbits")):
        if (bits := table[name].flatten().tolist()) == [-1] or len(bits) != 1:
            raise QatError(f"{name!r} is {bits}, a float (-1) or head-wise (several) build: give a per-tensor model")


def refuse_used(table: Table, unused: Collection[str]) -> None:
    """Raise QatError if a quantizer that VVTQ's network never calls does not have its initial values."""
    for q in unused:
        for name, value in (("init_state", 0), ("nbits", 8), ("alpha", 0)):
            if (table[f"{q}.{name}"] != value).any():
                found = table[f"{q}.{name}"].tolist()
                what = f"'{q}.{name}' is {found}, not {value}"
                raise QatError(f"{what}: VVTQ never calls this quantizer; give an unchanged file")


def find_offsets(table: Table, places: Places, layout: OfficialLayout) -> set[str]:
    """The sites with an offset: those after GELU, or all those to which VVTQ's ``--use-offset`` adds one.

    Raises:
        QatError: for the first name by which the file differs from the nearer of these two.
    """
    gelu = {site for site in places if site.endswith(GELU)}
    every = {site for site in places if _takes_offset(site, layout)}
    found = {name for name in table if name.endswith(".beta")}
    owners = {len(sites): [f"{places[site][0]}.beta" for site in sites] for sites in (gelu, every)}
    wanted = {n: {name for owner in betas for name in layout.names(owner)} for n, betas in owners.items()}
    near = min(wanted, key=lambda n: len(wanted[n] ^ found))
    for name in sorted(wanted[near] ^ found):
        what, counts = "unexpected" if name in found else "missing", [len(names) for names in wanted.values()]
        raise QatError(f"{name!r} is {what}: {len(found)} offsets, not one of {counts}; give an unchanged file")
    return gelu if near == len(gelu) else every


def _takes_offset(site: str, layout: OfficialLayout) -> bool:
    """Whether ``--use-offset`` reaches a site: no weights, no softmax, and outside the blocks only the head's input."""
    if site in layout.outside:
        return site.startswith("head") and site.endswith(".input_quant")
    return not site.endswith((PROBS, ".weight_quant"))


def read_widths(table: Table, places: Places, layout: OfficialLayout, reduction_bits: ReductionBits) -> dict[str, int]:
    """The width of every site: in the blocks one width for all weights and one for all activations, outside 8.

    Raises:
        QatError: for a width that is no integer from 2 to 8, that differs from the others, or that was trained while
            ``reduction_bits`` is ``8``.
    """
    widths: dict[str, int] = {}
    known = {"fixed": ("the first and last layer", 8)}
    for site, sources in places.items():
        if site in layout.trained:
            widths[site] = _read_trained(table, sources[0], reduction_bits)
            continue
        kind = "fixed" if site in layout.outside else "weight" if site.endswith(".weight_quant") else "activation"
        for q in sources:
            bits = table[f"{q}.nbits"].item()
            if bits not in range(MIN_BITS, MAX_BITS + 1):
                raise QatError(f"'{q}.nbits' is {bits:g}: only integers 2 to 8 are converted")
            where, widths[site] = known.setdefault(kind, (q, int(bits)))
            if bits != widths[site]:
                raise QatError(f"'{q}.nbits' is {bits:g}, but {where} has {widths[site]}: give a model of one width")
    return widths


def _read_trained(table: Table, q: str, reduction_bits: ReductionBits) -> int:
    """A width that VVTQ trained as a parameter; its network rounds it in every forward pass."""
    bits = table[f"{q}.nbits"].item()
    if not isfinite(bits):
        raise QatError(f"'{q}.nbits' is {bits}: the training had diverged, give an earlier file")
    width = round(min(max(bits, MIN_BITS), MAX_BITS))
    if bits != 8 and reduction_bits != "trained":
        raise QatError(
            f"'{q}.nbits' is {bits:g}, which VVTQ trained from 8 by accident, and its network computes with {width} "
            "bits there: give --reduction_bits trained to keep them"
        )
    if bits != 8:
        log.warning("%s.nbits is %g, trained from 8: converted with %d bits", q, bits, width)
    return width


def read_step(table: Table, q: str, slot: int) -> Tensor:
    """The step in the slot of the quantizer's width; QatError if it was never set or has collapsed."""
    state, step = table[f"{q}.init_state"].item(), table[f"{q}.alpha"][slot]
    if state != 1:
        raise QatError(f"'{q}.init_state' is {state:g}, not 1: the quantizer was never used; give a trained file")
    if not MIN_STEP < step.item() < float("inf"):
        what = f"'{q}.alpha[{slot}]' is {step.item():g}, and a trained step is finite and above {MIN_STEP:g}"
        raise QatError(f"{what}: never set, or collapsed; give a trained file")
    return step
