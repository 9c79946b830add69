"""Official files of Swin (arXiv 2103.14030), and of VVTQ after them.

In official files the layer that merges patches belongs to the end of a stage, in timm to the start of the next; timm's
head is one module deeper. Official files also store the index of relative positions and the masks of shifted windows,
which timm computes. VVTQ quantizes neither the image nor the input of the merging layers, and it trains the widths of
their weights.
"""

from __future__ import annotations

import re
from functools import cache
from typing import ClassVar

from qat.models import build_float
from qat.official.layout import OfficialLayout, Places, Sizes, Table

MERGING_LAYERS = {s: f"layers.{s + 1}.downsample.reduction" for s in range(3)}  # stage of the file -> our layer


class SwinLayout(OfficialLayout):
    """Swin-T, S and B with windows of 7 x 7 tokens; float weights also of any other timm Swin, if it is named."""

    mark = "layers."
    prefix = "swin_"
    archs: ClassVar[Sizes] = {
        (96, 12): "swin_tiny_patch4_window7_224",
        (96, 24): "swin_small_patch4_window7_224",
        (128, 24): "swin_base_patch4_window7_224",
    }
    outside: ClassVar[Places] = {
        "patch_embed.proj.weight_quant": ("patch_embed.proj",),
        **{f"{layer}.weight_quant": (f"layers.{s}.downsample.reduction",) for s, layer in MERGING_LAYERS.items()},
        "head.fc.input_quant": ("quant",),
        "head.fc.weight_quant": ("head",),
    }
    trained = tuple(f"{layer}.weight_quant" for layer in MERGING_LAYERS.values())
    unused = ("patch_embed.quant",)
    rules = tuple({"match": f"{place}.input_quant", "spec": None} for place in ("patch_embed.proj", "*.reduction"))

    def measure(self, table: Table) -> tuple[int, int]:
        """Channels of the first stage, and number of blocks in all stages."""
        channels = table["patch_embed.norm.weight"].numel() if "patch_embed.norm.weight" in table else 0
        blocks = (re.match(r"layers\.\d+\.blocks\.\d+\.", name) for name in table)
        return channels, len({block[0] for block in blocks if block})

    def refusal(self, measured: tuple[int, int]) -> str:
        channels, blocks = measured
        size = f"{channels} channels (patch_embed.norm) and {blocks} blocks"
        return f"no Swin-T, S or B has {size}: give its timm name (--arch)"

    def rename(self, name: str) -> str:
        name = re.sub(r"^head\.fc\.", "head.", name)
        return re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample.", name)

    def constants(self, arch: str) -> Table:
        return _computed(arch)


@cache
def _computed(arch: str) -> Table:
    """The buffers that timm's model computes and does not save."""
    model = build_float(arch, None)
    weights = model.state_dict()
    return {name: value for name, value in model.named_buffers() if name not in weights}
