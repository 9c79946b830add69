"""ViT and DeiT of timm. Shapes: B images, H heads, N tokens, D head width, C = H * D channels."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.attention import QuantHeads
from qat.models.layers import QuantLayerNorm
from qat.sites.family import Family, NormLink, Unit, family
from qat.sites.insert import FloatSite, SiteBuilder, swap_children, swaps


@family(VisionTransformer, VisionTransformerDistilled)
class ViTFamily(Family):
    """Checks, LayerNorms and units of a ViT."""

    def check(self, model: VisionTransformer) -> None:
        """Refuse, by name, a part that would compute products without a site."""
        if type(model.patch_embed) is not PatchEmbed:
            raise QatError(f"patch_embed is a {type(model.patch_embed).__name__}: only timm's PatchEmbed is reproduced")
        if model.attn_pool is not None:
            kind = type(model.attn_pool).__name__
            raise QatError(f"attention pooling ({kind}) is not reproduced: use token or avg pool")
        for i, block in enumerate(model.blocks):
            if type(block) is not Block:
                raise QatError(f"blocks.{i} is a {type(block).__name__}: only timm's Block is reproduced")
            if type(block.attn) is not Attention:
                kind = type(block.attn).__name__
                raise QatError(f"blocks.{i}.attn is a {kind}: only timm's Attention is reproduced")

    def prepare(self, model: VisionTransformer, site: SiteBuilder) -> None:
        """Sites on the tokens, on the position embedding and on their sum."""
        C = model.embed_dim
        found = {
            "tokens_quant": site.activation("tokens_quant", channel=(-1, C)),
            "pos_embed_quant": site.weight("pos_embed_quant", channel=(-1, C)),
            "embed_quant": site.activation("embed_quant", channel=(-1, C)),
        }
        children = list(model._modules.items())
        first = 1 + [name for name, _ in children].index("patch_embed")
        for name, _ in children[first:]:
            del model._modules[name]
        for module in found.values():
            module.train(model.training)
        model._modules.update({**found, **dict(children[first:])})  # sites are listed in the order of the network
        model.__class__ = EMBEDDING[type(model)]  # the only way to reach a sum inside a method of the root
        quantized = [name for name in ("tokens_quant", "pos_embed_quant") if not isinstance(found[name], FloatSite)]
        if quantized and (model.pos_embed is None or model.dynamic_img_size):
            raise QatError(
                f"site {quantized[0]!r}: the embedding is only reproduced with positions, and for images of one size: "
                "set the sites tokens_quant and pos_embed_quant to null"
            )

    def norm_links(self, model: VisionTransformer) -> list[NormLink]:
        """Two LayerNorms in every block, and the last."""
        before = "embed_quant" if isinstance(model.norm_pre, nn.Identity) else None
        links = []
        for i in range(len(model.blocks)):
            block = f"blocks.{i}"
            links.append(NormLink(f"{block}.norm1", before, f"{block}.attn.qkv"))
            links.append(NormLink(f"{block}.norm2", f"{block}.attn_residual_quant", f"{block}.mlp.fc1"))
            before = f"{block}.mlp_residual_quant"
        if isinstance(model.norm, QuantLayerNorm):
            links.append(NormLink("norm", before, None))
        return links

    def units(self, model: VisionTransformer) -> list[Unit]:
        """Embedding, every block, head."""

        def embed(x: Tensor) -> Tensor:
            return cast(Tensor, model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))

        blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
        head = [name for name in ("norm", "fc_norm", "head", "head_dist") if hasattr(model, name)]
        embedding = ("patch_embed", "tokens_quant", "pos_embed_quant", "embed_quant", "norm_pre")
        return [
            Unit("embedding", embed, embedding, tuple(name for name, _ in model.named_parameters(recurse=False))),
            *(Unit(name, block, (name,)) for name, block in blocks),
            Unit("head", lambda x: model.forward_head(model.norm(x)), tuple(head)),
        ]


class QuantEmbedding:
    """Sites in the embedding of a timm ViT: [class, distillation and register tokens; patches] + positions."""

    tokens_quant: nn.Module
    pos_embed_quant: nn.Module
    embed_quant: nn.Module

    def _pos_embed(self: Any, x: Tensor) -> Tensor:
        """Patches (B, N - T, C) and T other tokens to (B, N, C)."""
        if isinstance(self.tokens_quant, FloatSite) and isinstance(self.pos_embed_quant, FloatSite):
            return cast(Tensor, self.embed_quant(super()._pos_embed(x)))  # type: ignore[misc]
        found = [getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        others = [token.expand(len(x), -1, -1) for token in found if token is not None]
        positions = self.pos_embed_quant(self.pos_embed)
        if self.no_embed_class:  # the other tokens have no position
            x = torch.cat([*others, self.tokens_quant(x) + positions], 1)
        else:
            x = self.tokens_quant(torch.cat([*others, x], 1)) + positions
        return cast(Tensor, self.embed_quant(self.pos_drop(x)))


class QuantVisionTransformer(QuantEmbedding, VisionTransformer):
    """timm's class of the same name, with the sites of its embedding."""


class QuantVisionTransformerDistilled(QuantEmbedding, VisionTransformerDistilled):
    """timm's class of the same name, with the sites of its embedding."""


EMBEDDING: dict[type[VisionTransformer], type[VisionTransformer]] = {
    VisionTransformer: QuantVisionTransformer,
    VisionTransformerDistilled: QuantVisionTransformerDistilled,
}


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
