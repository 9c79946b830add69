"""ViT and DeiT of timm. Shapes: B images, H heads, N tokens, D head width, C = H * D channels."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from qat.describe import Product
from qat.errors import QatError
from qat.insert import SiteBuilder, family, swap_children, swaps
from qat.models.layers import QuantLinear
from qat.quantizers import FloatSite, product


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
class QuantAttention(nn.Module):
    """Self-attention with a site on every operand of its matrix products.

    The scores are written out, because fused attention has no place for ``probs_quant``; while neither scores nor
    probabilities are quantised, fused attention is used.
    """

    def __init__(self, attn: Attention, site: SiteBuilder) -> None:
        super().__init__()
        if attn.gate is not None:
            raise QatError(f"{site.prefix}gate: gated attention is not reproduced")
        H, D = attn.num_heads, attn.head_dim
        self.num_heads, self.head_dim, self.attn_dim, self.scale = H, D, H * D, attn.scale
        self.qkv = QuantLinear(attn.qkv, site.child("qkv"), weight_cuts={"qkv": (0, 3), "head": (0, 3 * H)})
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.q_quant = site.activation("q_quant", head=(1, H), channel=(-1, D))
        self.k_quant = site.activation("k_quant", head=(1, H), channel=(-1, D))
        self.v_quant = site.activation("v_quant", head=(1, H), channel=(-1, D))
        self.scores_quant = site.activation("scores_quant", head=(1, H))
        self.probs_quant = site.activation("probs_quant", head=(1, H))
        self.attn_drop, self.norm = attn.attn_drop, attn.norm
        self.proj = QuantLinear(attn.proj, site.child("proj"), {"head": (1, H)}, {"head": (-1, H)})
        self.proj_drop = attn.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D)
        x = self._attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal)  # (B, H, N, D)
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if isinstance(self.scores_quant, FloatSite) and isinstance(self.probs_quant, FloatSite):
            dropout = self.attn_drop.p if self.training else 0.0
            q, k, v = self.q_quant(q), self.k_quant(k), self.v_quant(v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        scores = self.scores_quant(product(self._scores, (self.q_quant, q), (self.k_quant, k)))  # (B, H, N, N)
        if is_causal:  # a mask comes after scores_quant, which would clip -inf
            scores = scores + scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return product(self._mix, (self.probs_quant, scores.softmax(-1)), (self.v_quant, v))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scale inside the product: q * scale would be one more tensor to keep for backward."""
        flat, zero = (q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), q.new_zeros(())
        scores: Tensor = torch.baddbmm(zero, *flat, beta=0, alpha=self.scale).unflatten(0, q.shape[:2])
        return scores

    def _mix(self, probs: Tensor, v: Tensor) -> Tensor:
        dropped: Tensor = self.attn_drop(probs)
        return dropped @ v

    def products(self, shape: tuple[int, ...]) -> list[Product]:
        """The two products between tokens for one image, from the shape (B, N, C) of an input."""
        macs = shape[1] ** 2 * self.attn_dim
        return [Product(macs, "q_quant", "k_quant"), Product(macs, "probs_quant", "v_quant")]
