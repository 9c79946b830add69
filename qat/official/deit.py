"""Official files of DeiT (arXiv 2012.12877), whose names are timm's; VVTQ keeps them."""

from __future__ import annotations

from typing import ClassVar

from qat.official.family import Family, Places, Sizes, Table


class DeiT(Family):
    """Any timm model whose official names are timm's, and quantized the three sizes of DeiT."""

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
        """Width and depth."""
        width = table["cls_token"].numel() if "cls_token" in table else 0
        return width, len({name.split(".")[1] for name in table if name.startswith("blocks.")})

    def refusal(self, measured: tuple[int, int]) -> str:
        width, depth = measured
        return f"width {width} and depth {depth} (cls_token, blocks) tell no DeiT: give its timm name (--arch)"

    def remark(self, split: bool) -> str:
        return split * (
            "VVTQ's float training clamps GELU outputs to at most 1, timm's model does not, and names cannot tell "
            "whether these weights were trained so: measure them (--model.recipe float) before you train from them"
        )
