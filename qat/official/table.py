"""A table of official weights: which model it holds, and the weights of that model under our names.

A name that is missing or left over is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.errors import QatError
from qat.models import build_float
from qat.models.arch import find_architecture
from qat.official.deit import DeiTLayout
from qat.official.layout import SPLIT, OfficialLayout, Table
from qat.official.sret import SReTLayout
from qat.official.swin import SwinLayout

LENGTHS = {"nbits": 1, "alpha": 7, "init_state": 1}  # tensors that every quantizer owns, and how long they are
ADVICE = "give an official file, or its timm name (--arch)"


@dataclass(frozen=True)
class OfficialTable:
    """A table of tensors and the model that they belong to.

    Args:
        table: names and tensors of the file.
        layout: how the family of the model names them.
        arch: timm name of the model.
        split: q, k and v have a projection each.
        weights: names and shapes of our model, on the device ``meta``.
        outputs: number of outputs of its head.
    """

    table: Table
    layout: OfficialLayout
    arch: str
    split: bool
    weights: Table
    outputs: int

    @property
    def quantized(self) -> bool:
        """Whether some of the tensors belong to quantizers."""
        return any(name.rpartition(".")[2] in LENGTHS for name in self.table)

    def parts(self, name: str) -> tuple[str, ...]:
        """The names in the file of the tensors that make up one of our weights: one name, or those of q, k and v."""
        theirs = self.layout.rename(name)
        if self.split and ".attn.qkv." in theirs:
            return tuple(theirs.replace(".qkv.", f".{part}.") for part in SPLIT)
        return (theirs,)

    def check(self, owned: Table) -> None:
        """Check that the file has the weights of the model, the tensors ``owned`` by quantizers, and nothing else.

        Raises:
            QatError: for a tensor that is missing, unexpected, of another shape or type, or not finite; for two names
                of one tensor with different values; for a constant that differs from what the model computes.
        """
        wanted: dict[str, Tensor] = {}
        for name, value in self.weights.items():
            parts = self.parts(name)
            wanted |= zip(parts, value.chunk(len(parts)) if len(parts) > 1 else [value], strict=True)
        wanted |= owned
        constants = self.layout.constants(self.arch)
        copies = {copy: name for name in wanted for copy in self.layout.names(name)[1:]}
        _check_tensors(self.table, {**wanted, **constants, **{copy: wanted[name] for copy, name in copies.items()}})
        for copy, name in copies.items():
            if not _same_bits(self.table[copy], self.table[name]):
                raise QatError(f"{copy!r} differs from {name!r}, two names of one tensor: give an unchanged file")
        for name, value in constants.items():
            if not torch.equal(self.table[name], value):
                raise QatError(f"{name!r} differs from what {self.arch} computes: {ADVICE}")

    def fuse(self) -> dict[str, Tensor]:
        """Copies of the weights under our names, in which q, k and v are one tensor with rows in this order."""
        parts = {name: [self.table[part] for part in self.parts(name)] for name in self.weights}
        return {name: torch.cat(values) if len(values) > 1 else values[0].clone() for name, values in parts.items()}


def identify(table: Table, arch: str | None) -> OfficialTable:
    """Find out which model a table holds, by names and sizes where ``arch`` is None.

    Raises:
        QatError: for a table without attention, with both layouts of it, or of an unknown size.
    """
    split = _is_split(table)
    layout = _find_layout(table, arch)
    arch = arch or layout.find_arch(table)
    return OfficialTable(table, layout, arch, split, *_outline(arch, _count_outputs(table, layout, arch)))


@cache
def _outline(arch: str, outputs: int | None) -> tuple[Table, int]:
    """The weights of a model on the device ``meta``, and the number of outputs of its head; timm's where None."""
    with torch.device("meta"):
        model: Any = build_float(arch, None, outputs)
    return model.state_dict(), model.num_classes


def _count_outputs(table: Table, layout: OfficialLayout, arch: str) -> int | None:
    """How many outputs the head in a file has; None where there is none."""
    names = find_architecture(arch).cfg.get("classifier") or "head"
    first = names if isinstance(names, str) else names[0]
    weight = table.get(layout.rename(f"{first}.weight"))
    return len(weight) if weight is not None and weight.ndim == 2 and len(weight) > 1 else None


def _find_layout(table: Table, arch: str | None) -> OfficialLayout:
    layouts: tuple[OfficialLayout, ...] = (SwinLayout(), SReTLayout(), DeiTLayout())
    if arch:
        return next(layout for layout in layouts if arch.startswith(layout.prefix))
    return next((layout for layout in layouts if any(name.startswith(layout.mark) for name in table)), layouts[-1])


def _is_split(table: Table) -> bool:
    """Whether q, k and v have a projection each."""
    fused, split = (next((n for n in table if f".attn.{part}." in n), None) for part in ("qkv", "proj_q"))
    if fused and split:
        raise QatError(f"{fused!r} is a fused projection and {split!r} a split one: give the table of one model")
    if not fused and not split:
        first = next(iter(table), "")
        raise QatError(f"no name has 'attn.qkv' or 'attn.proj_q', the first is {first!r}: give a DeiT, Swin or SReT")
    return split is not None


def _check_tensors(table: Table, wanted: Table) -> None:
    """Raise QatError unless names, shapes and types are exactly these, and the weights are finite."""
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
        if name.rpartition(".")[2] not in LENGTHS and not torch.isfinite(value).all():
            raise QatError(f"{name!r} is not finite: the training had diverged, give an earlier file")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
