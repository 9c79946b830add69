"""A table of official weights, read by the names that our model has: nothing missing, nothing left over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.errors import QatError
from qat.models import build_float
from qat.official.deit import DeiT
from qat.official.family import SPLIT, Family, Table
from qat.official.sret import SReT
from qat.official.swin import Swin

OWN = {"nbits": 1, "alpha": 7, "init_state": 1}  # what every quantizer owns, and its length
ADVICE = "give an official file, or its timm name (--arch)"


@dataclass(frozen=True)
class Source:
    """A table and what it is of.

    Args:
        table: names and tensors of the file.
        family: of its model.
        arch: timm name of its model.
        split: q, k and v have projections of their own.
        weights: of our model, without values.
        outputs: of its head.
    """

    table: Table
    family: Family
    arch: str
    split: bool
    weights: Table
    outputs: int

    @property
    def quantized(self) -> bool:
        """Whether quantizers own some of the tensors."""
        return any(name.rpartition(".")[2] in OWN for name in self.table)

    def parts(self, name: str) -> tuple[str, ...]:
        """The names in the file of what makes one of our weights: one, or those of q, k and v."""
        theirs = self.family.rename(name)
        if self.split and ".attn.qkv." in theirs:
            return tuple(theirs.replace(".qkv.", f".{part}.") for part in SPLIT)
        return (theirs,)

    def check(self, quantizers: Table) -> None:
        """Raise QatError unless the file has these tensors of quantizers and the weights of the model, and no more."""
        wanted: dict[str, Tensor] = {}
        for name, value in self.weights.items():
            parts = self.parts(name)
            wanted |= zip(parts, value.chunk(len(parts)) if len(parts) > 1 else [value], strict=True)
        wanted |= quantizers
        constants = self.family.constants(self.arch)
        copies = {copy: name for name in wanted for copy in self.family.names(name)[1:]}
        _check_tensors(self.table, {**wanted, **constants, **{copy: wanted[name] for copy, name in copies.items()}})
        for copy, name in copies.items():
            if not _same_bits(self.table[copy], self.table[name]):
                raise QatError(f"{copy!r} differs from {name!r}, two names of one tensor: give an unchanged file")
        for name, value in constants.items():
            if not torch.equal(self.table[name], value):
                raise QatError(f"{name!r} is not what {self.arch} computes with: {ADVICE}")

    def fuse(self) -> dict[str, Tensor]:
        """The weights with our names, rows of q, k and v in this order; copies, which no other tensor shares."""
        parts = {name: [self.table[part] for part in self.parts(name)] for name in self.weights}
        return {name: torch.cat(values) if len(values) > 1 else values[0].clone() for name, values in parts.items()}


def identify(table: Table, arch: str | None) -> Source:
    """Find out what a table is of; the model is told by names and sizes where ``arch`` is None."""
    split = _is_split(table)
    family = _find_family(table, arch)
    arch = arch or family.tell(table)
    return Source(table, family, arch, split, *_outline(arch))


@cache
def _outline(arch: str) -> tuple[Table, int]:
    """The weights of a model, without values, and the outputs of its head."""
    with torch.device("meta"):
        model: Any = build_float(arch, None)
    return model.state_dict(), model.num_classes


def _find_family(table: Table, arch: str | None) -> Family:
    families: tuple[Family, ...] = (Swin(), SReT(), DeiT())
    if arch:
        return next(family for family in families if arch.startswith(family.prefix))
    return next((family for family in families if any(name.startswith(family.mark) for name in table)), families[-1])


def _is_split(table: Table) -> bool:
    """Whether q, k and v have projections of their own."""
    fused, split = (next((n for n in table if f".attn.{part}." in n), None) for part in ("qkv", "proj_q"))
    if fused and split:
        raise QatError(f"{fused!r} is a fused projection and {split!r} a split one: give the table of one model")
    if not fused and not split:
        first = next(iter(table), "")
        raise QatError(f"no name has 'attn.qkv' or 'attn.proj_q', the first is {first!r}: give a DeiT, Swin or SReT")
    return split is not None


def _check_tensors(table: Table, wanted: Table) -> None:
    """Names, shapes and types are exactly these, and the weights are finite."""
    missing, extra = [name for name in wanted if name not in table], [name for name in table if name not in wanted]
    if missing or extra:
        what = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is unexpected"
        counts = f"{len(table)} names, {len(missing)} missing and {len(extra)} unexpected"
        raise QatError(f"{what} ({counts}): {ADVICE}")
    for name, like in wanted.items():
        value = table[name]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            found, right = (f"{tuple(x.shape)} {x.dtype}" for x in (value, like))
            raise QatError(f"{name!r} is {found}, not {right}: {ADVICE}")
        if name.rpartition(".")[2] not in OWN and not torch.isfinite(value).all():
            raise QatError(f"{name!r} is not finite: the training had diverged, give an earlier file")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
