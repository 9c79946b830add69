"""Official files of DeiT (arXiv 2012.12877), whose names are timm's; VVTQ keeps them."""

from __future__ import annotations

from typing import ClassVar

from qat.official.layout import OfficialLayout, Places, Sizes, Table


class DeiTLayout(OfficialLayout):
    """Float weights of any timm model whose official names are timm's; quantized ones of DeiT-T, S and B."""

    mark = "blocks."
    prefix = ""
    archs: ClassVar[Sizes] = {
        (192, 12): "deit_tiny_patch16_224",
        (384, 12): "deit_small_patch16_224",
        (768, 12): "deit_base_patch16_224",
    }
    outside: ClassVar[Places] = {
        "patch_embed.proj.input_quant": ("patch_embed.quant",),
        "patch_embed.proj.weight_quant": ("patch_embed.proj",),
        "head.input_quant": ("quant",),
        "head.weight_quant": ("head",),
    }

    def measure(self, table: Table) -> tuple[int, int]:
        """Channels and number of blocks."""
        channels = table["cls_token"].numel() if "cls_token" in table else 0
        return channels, len({name.split(".")[1] for name in table if name.startswith("blocks.")})

    def refusal(self, measured: tuple[int, int]) -> str:
        channels, blocks = measured
        return f"no DeiT has {channels} channels (cls_token) and {blocks} blocks: give its timm name (--arch)"

    def remark(self, split: bool) -> str:
        return split * (
            "VVTQ's float training clamps GELU outputs to at most 1, timm's model does not, and the names do not show "
            "which of the two these weights were trained with: before you train from them, evaluate them with "
            "--model.recipe float"
        )
