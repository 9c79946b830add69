"""ViT and DeiT of timm. Shapes: B images, H heads, N tokens, D head width, C = H * D channels."""

from __future__ import annotations

from typing import cast

from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from qat.errors import QatError
from qat.insert import SiteBuilder, family, swap_children, swaps
from qat.models.attention import QuantHeads


@family(VisionTransformer, VisionTransformerDistilled)
def check(model: VisionTransformer) -> None:
    """Refuse, by name, what would compute matrix products that no site reaches."""
    if type(model.patch_embed) is not PatchEmbed:
        raise QatError(f"patch_embed is a {type(model.patch_embed).__name__}: only timm's PatchEmbed is reproduced")
    if model.attn_pool is not None:
        raise QatError(f"attention pooling ({type(model.attn_pool).__name__}) is not reproduced: use token or avg pool")
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise QatError(f"blocks.{i} is a {type(block).__name__}: only timm's Block is reproduced")
        if type(block.attn) is not Attention:
            raise QatError(f"blocks.{i}.attn is a {type(block.attn).__name__}: only timm's Attention is reproduced")


@swaps(Block)
class QuantBlock(nn.Module):
    """A transformer block with sites on the residual stream (B, N, C) after each of its two sums."""

    def __init__(self, block: Block, site: SiteBuilder) -> None:
        super().__init__()
        C = cast(Attention, block.attn).qkv.in_features
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2
        swap_children(self, site)
        self.attn_residual_quant = site.activation("attn_residual_quant", channel=(-1, C))
        self.mlp_residual_quant = site.activation("mlp_residual_quant", channel=(-1, C))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        branch = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.attn_residual_quant(x + self.drop_path1(self.ls1(branch)))
        out: Tensor = self.mlp_residual_quant(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))
        return out


@swaps(Attention)
class QuantAttention(QuantHeads):
    """Self-attention of all tokens."""

    def __init__(self, attn: Attention, site: SiteBuilder) -> None:
        if attn.gate is not None:
            raise QatError(f"{site.prefix}gate: gated attention is not reproduced")
        super().__init__(attn, site, attn.num_heads, attn.head_dim, attn.scale)
        self.q_norm, self.k_norm, self.norm, self.proj_drop = attn.q_norm, attn.k_norm, attn.norm, attn.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        B, N, _ = x.shape
        q, k, v = self.heads(x)
        x = self.attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal)  # (B, H, N, D)
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        out: Tensor = self.proj_drop(self.proj(x))
        return out
