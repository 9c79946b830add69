"""Swin of timm. Shapes: B images, h x w tokens, W windows of an image, N tokens of a window, H heads, C channels.

A window is a sample of its own: attention sees (B * W, N, C).
"""

from __future__ import annotations

from typing import Any, cast

from timm.layers import PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.attention import QuantHeads, pair_bias
from qat.models.layers import QuantLayerNorm
from qat.sites.family import Family, NormLink, Unit, family
from qat.sites.insert import SiteBuilder, swap_children, swaps


@family(SwinTransformer)
class SwinFamily(Family):
    """Checks, LayerNorms and units of a Swin."""

    def check(self, model: SwinTransformer) -> None:
        """Refuse, by name, a part that would compute products without a site, or another mask."""
        _require(model, "patch_embed", PatchEmbed)
        stage: Any
        for i, stage in enumerate(model.layers):
            _require(model, f"layers.{i}", SwinTransformerStage)
            _require(model, f"layers.{i}.downsample", PatchMerging, nn.Identity)
            for j, block in enumerate(stage.blocks):
                name = f"layers.{i}.blocks.{j}"
                _require(model, name, SwinTransformerBlock)
                _require(model, f"{name}.attn", WindowAttention)
                if block.dynamic_mask:
                    raise QatError(f"{name}: strict_img_size: false is not reproduced: set img_size, and leave it out")

    def norm_links(self, model: SwinTransformer) -> list[NormLink]:
        """The norm of the patches, two in every block, one before every merging, and the last."""
        links = []
        if isinstance(model.patch_embed.norm, QuantLayerNorm):
            links.append(NormLink("patch_embed.norm", "patch_embed.proj.output_quant", None))
        before = "patch_embed.norm.output_quant" if links else "patch_embed.proj.output_quant"
        stage: Any
        for i, stage in enumerate(model.layers):
            if not isinstance(stage.downsample, nn.Identity):
                norm = f"layers.{i}.downsample"
                links.append(NormLink(f"{norm}.norm", before, f"{norm}.reduction"))
                before = f"{norm}.reduction.output_quant"
            for j in range(len(stage.blocks)):
                block = f"layers.{i}.blocks.{j}"
                middle = f"{block}.attn_residual_quant"
                links.append(NormLink(f"{block}.norm1", before, f"{block}.attn.qkv"))
                links.append(NormLink(f"{block}.norm2", middle, f"{block}.mlp.fc1"))
                before = f"{block}.mlp_residual_quant"
        return [*links, NormLink("norm", before, None)]

    def units(self, model: SwinTransformer) -> list[Unit]:
        """Patches, every block, every merging, head."""
        parts: list[tuple[str, nn.Module]] = [("patch_embed", model.patch_embed)]
        stage: Any
        for i, stage in enumerate(model.layers):
            if not isinstance(stage.downsample, nn.Identity):
                parts.append((f"layers.{i}.downsample", stage.downsample))
            parts += [(f"layers.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
        head = Unit("head", lambda x: model.forward_head(model.norm(x)), ("norm", "head"))
        return [*(Unit(name, part, (name,)) for name, part in parts), head]


def _require(model: nn.Module, name: str, *kinds: type[nn.Module]) -> None:
    module = model.get_submodule(name)
    if type(module) not in kinds:
        raise QatError(f"{name} is a {type(module).__name__}: only timm's {kinds[0].__name__} is reproduced")


@swaps(SwinTransformerBlock)
class QuantWindowBlock(nn.Module):
    """A block over windows, shifted or not, with sites on the residual stream after each of its two sums."""

    attend_windows: Any = SwinTransformerBlock._attn  # of timm: shift, pad, cut into windows, self.attn, and back

    def __init__(self, block: SwinTransformerBlock, site: SiteBuilder) -> None:
        super().__init__()
        self.window_size, self.window_area, self.shift_size = block.window_size, block.window_area, block.shift_size
        self.register_buffer("attn_mask", cast(Tensor | None, block.attn_mask), persistent=False)
        self.norm1, self.attn, self.drop_path1 = block.norm1, block.attn, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2
        swap_children(self, site)
        self.attn_residual_quant = site.activation("attn_residual_quant", channel=(-1, block.dim))
        self.mlp_residual_quant = site.activation("mlp_residual_quant", channel=(-1, block.dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, h, w, C)."""
        x = self.attn_residual_quant(x + self.drop_path1(self.attend_windows(self.norm1(x))))
        out: Tensor = self.mlp_residual_quant(x + self.drop_path2(self.mlp(self.norm2(x))))
        return out


@swaps(WindowAttention)
class QuantWindowAttention(QuantHeads):
    """Self-attention of the tokens of a window, with a bias for their relative position."""

    def __init__(self, attn: WindowAttention, site: SiteBuilder) -> None:
        super().__init__(attn, site, attn.num_heads, attn.proj.in_features // attn.num_heads, attn.scale)
        self.relative_position_bias_table, self.window_size = attn.relative_position_bias_table, attn.window_size
        self.relative_position_bias_table_quant = site.weight(
            "relative_position_bias_table_quant", channel=(-1, attn.num_heads)
        )
        self.proj_drop = attn.proj_drop

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B * W, N, C) to (B * W, N, C); the mask of shifted windows (W, N, N) is added to the scores."""
        if mask is not None:
            mask = mask.unsqueeze(1).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)  # (B * W, 1, N, N)
        x = self.attend(*self.heads(x), mask, bias=self.position_bias()).transpose(1, 2).flatten(2)  # (B * W, N, H * D)
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def position_bias(self) -> Tensor:
        """The entry of the table for every pair of tokens (1, H, N, N)."""
        table = self.relative_position_bias_table_quant(self.relative_position_bias_table)
        return pair_bias(table, self.window_size).unsqueeze(0)
