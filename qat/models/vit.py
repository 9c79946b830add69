"""ViT and DeiT of timm, and what timm builds as one: DINOv2, CLIP, SigLIP, AIMv2, MAE. Shapes: see `qat.models.tokens`.

H heads, D head width.
"""

from __future__ import annotations

from typing import Any, cast

from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    LayerScale,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.attention import QuantHeads, raise_for_float_operands
from qat.models.layers import QuantLayerNorm
from qat.models.stream import PostNormBlock, TwoSumBlock
from qat.models.tokens import TOKENS, QuantEmbedding, TokenFamily
from qat.sites.family import Stream, family
from qat.sites.insert import SiteBuilder, swaps

BRANCHES = {"attn.proj": "ls1", "mlp.fc2": "ls2"}  # of a block: the layer at the end of a branch, and its scale


class QuantViTEmbedding(QuantEmbedding):
    """The embedding of a timm ViT."""

    def _pos_embed(self: Any, x: Tensor) -> Tensor:
        """Patches (B, P, C), or (B, h, w, C), to tokens (B, N, C)."""
        if self.float_tokens:
            return cast(Tensor, self.embed_quant(super()._pos_embed(x)))  # type: ignore[misc]
        return cast(Tensor, self.embed_quant(self.pos_drop(self.join(x))))


class QuantVisionTransformer(QuantViTEmbedding, VisionTransformer):
    """timm's class of the same name, with the sites of its embedding."""


class QuantVisionTransformerDistilled(QuantViTEmbedding, VisionTransformerDistilled):
    """timm's class of the same name, with the sites of its embedding."""


@family(VisionTransformer, VisionTransformerDistilled)
class ViTFamily(TokenFamily):
    """A ViT, with one or two class tokens."""

    blocks = (Block, ResPostBlock, ParallelScalingBlock, ParallelThingsBlock)
    attentions = (Attention,)
    roots = (QuantVisionTransformer, QuantVisionTransformerDistilled)

    def stream(self, model: Any) -> Stream | None:
        """That of a ViT whose branches begin with a LayerNorm, and end with a layer and nothing else."""
        last = [name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity)]
        heads = tuple(name for name in ("head", "head_dist") if hasattr(getattr(model, name, None), "weight"))
        between = (model.norm_pre, model.patch_embed.norm)  # what may change the stream outside of blocks
        pools = getattr(model, "attn_pool", None) is not None
        if len(last) != 1 or not heads or pools or not all(isinstance(part, nn.Identity) for part in between):
            return None
        if not all(map(is_plain, model.blocks)) or not is_layer_norm(model.get_submodule(last[0])):
            return None
        names = [f"blocks.{i}" for i in range(len(model.blocks))]
        reads = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
        return Stream(
            tuple(name for name in (*TOKENS, "pos_embed") if getattr(model, name, None) is not None),
            ("patch_embed.proj", *(f"{name}.{layer}" for name in names for layer in BRANCHES)),
            {
                f"{name}.{layer}": f"{name}.{scale}.gamma"
                for name in names
                for layer, scale in BRANCHES.items()
                if isinstance(model.get_submodule(f"{name}.{scale}"), LayerScale)
            },
            (*((f"{name}.{norm}", (f"{name}.{layer}",)) for name in names for norm, layer in reads), (last[0], heads)),
        )

    def embed(self, model: VisionTransformer, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the first block reads (B, N, C)."""
        return cast(Tensor, model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))


def is_plain(block: Any) -> bool:
    """Whether a block is two sums of the stream and what attention, or an MLP, makes of its LayerNorm."""
    return (
        type(block) in (Block, QuantBlock)
        and type(block.mlp) is Mlp
        and all(isinstance(scale, nn.Identity | LayerScale) for scale in (block.ls1, block.ls2))
        and is_layer_norm(block.norm1)
        and is_layer_norm(block.norm2)
    )


def is_layer_norm(norm: Any) -> bool:
    """Whether a module is a LayerNorm with a scale and a shift for each channel."""
    return isinstance(norm, nn.LayerNorm | QuantLayerNorm) and norm.weight is not None and norm.bias is not None


@swaps(Block)
class QuantBlock(TwoSumBlock):
    """The block of most ViTs."""

    ls1: nn.Module
    ls2: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        branch = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.attn_residual_quant(x + self.drop_path1(self.ls1(branch)))
        out: Tensor = self.mlp_residual_quant(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))
        return out


@swaps(ResPostBlock)
class QuantResPostBlock(PostNormBlock):
    """A block whose norms are at the end of its branches."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        branch = self.norm1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))
        x = self.attn_residual_quant(x + self.drop_path1(branch))
        out: Tensor = self.mlp_residual_quant(x + self.drop_path2(self.norm2(self.mlp(x))))
        return out


@swaps(Attention)
class QuantAttention(QuantHeads):
    """Self-attention of all tokens."""

    def __init__(self, attn: Attention, site: SiteBuilder) -> None:
        if attn.gate is not None:
            raise QatError(f"{site.prefix}gate: gated attention is not reproduced")
        super().__init__(attn, site, attn.num_heads, attn.head_dim, attn.scale)
        self.q_norm, self.k_norm, self.norm, self.proj_drop = attn.q_norm, attn.k_norm, attn.norm, attn.proj_drop
        if not isinstance(attn.q_norm, nn.Identity):
            raise_for_float_operands(site.prefix, self.qkv, self, "a norm changes")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        B, N, _ = x.shape
        q, k, v = self.heads(x)
        x = self.attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal)  # (B, H, N, D)
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        out: Tensor = self.proj_drop(self.proj(x))
        return out
