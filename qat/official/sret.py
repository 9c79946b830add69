"""Official files of SReT (arXiv 2111.05297), and of VVTQ after them.

Official stages list the modules in the order of their application: block 0, MLP 0, block 0 again, MLP 1, block 1, ...
A block is therefore stored under two names, entries 4 j and 4 j + 2. Scalars are modules there, with one ``bias``.
"""

from __future__ import annotations

import re
from typing import ClassVar

from qat.official.layout import OfficialLayout, Places, Sizes, Table

OTHERS = {(64, 256): "those of SReT-LT", (126, 378): "those of SReT-S"}


class SReTLayout(OfficialLayout):
    """SReT-T, distilled or not."""

    mark = "transformers."
    prefix = "sret_"
    archs: ClassVar[Sizes] = {(64, 230): "sret_tiny"}
    outside: ClassVar[Places] = {
        **{f"patch_embed.conv{i}.input_quant": (f"patch_embed.quant{i}",) for i in (1, 2, 3)},
        **{f"patch_embed.conv{i}.weight_quant": (f"patch_embed.conv{i}",) for i in (1, 2, 3)},
        **{f"pools.{i}.conv.input_quant": (f"pools.{i}.quant",) for i in (0, 1)},
        **{f"pools.{i}.conv.weight_quant": (f"pools.{i}.conv",) for i in (0, 1)},
        "head.input_quant": ("quant",),
        "head.weight_quant": ("head",),
    }

    def measure(self, table: Table) -> tuple[int, int]:
        """Channels of the first stage, and hidden channels of its blocks."""
        embedding, hidden = table.get("pos_embed"), table.get("transformers.0.blocks.0.mlp.fc1.bias")
        channels = embedding.shape[1] if embedding is not None and embedding.ndim == 4 else 0
        return channels, hidden.numel() if hidden is not None else 0

    def refusal(self, measured: tuple[int, int]) -> str:
        found = f"{measured[0]} channels (pos_embed) and {measured[1]} hidden ones (transformers.0.blocks.0.mlp.fc1)"
        return f"{found} are {OTHERS.get(measured, 'of no known SReT')}: only SReT-T (sret_tiny) is converted"

    def rename(self, name: str) -> str:
        name = re.sub(r"(coefficient\d)$", r"\1.bias", name)
        found = re.match(r"stages\.(\d+)\.(blocks|mlps)\.(\d+)\.(.*)", name)
        if not found:
            return name
        s, kind, i, rest = found.groups()
        entry = 4 * int(i) if kind == "blocks" else 2 * int(i) + 1
        return f"transformers.{s}.blocks.{entry}.{rest}"

    def names(self, name: str) -> tuple[str, ...]:
        found = re.match(r"(transformers\.\d+\.blocks)\.(\d+)\.(.*)", name)
        if not found or int(found[2]) % 4:
            return (name,)
        return name, f"{found[1]}.{int(found[2]) + 2}.{found[3]}"

    def remark(self, split: bool) -> str:
        return (not split) * (
            "the names do not show whether SReT was trained with slices: sret_tiny has the 8/2, 4/1 and 1/1 groups of "
            "SReT-T; for weights that were trained without slices, give model_args {groups: [[1, 1], [1, 1], [1, 1]]}"
        )
