"""Attention pooling of timm, the head of SigLIP and PE. Shapes: B images, N tokens, L queries, H heads, D head width.

Learned queries, the same for every image, attend to all tokens; an MLP with a residual follows.
"""

from __future__ import annotations

from functools import partial

from timm.layers import AttentionPoolLatent, Mlp
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.attention import AttentionSites, raise_for_float_operands
from qat.models.layers import QuantLayerNorm, QuantLinear
from qat.sites.family import NormLink
from qat.sites.insert import SiteBuilder, swapped, swaps
from qat.sites.products import Product


@swaps(AttentionPoolLatent)
class QuantAttentionPool(nn.Module):
    """Sites of its five layers, of attention (``attn``) and of the sum (B, L, C) after the MLP."""

    def __init__(self, pool: AttentionPoolLatent, site: SiteBuilder) -> None:
        super().__init__()
        if pool.mlp is not None and type(pool.mlp) is not Mlp:
            raise QatError(f"{site.prefix}mlp is a {type(pool.mlp).__name__}: only timm's Mlp is reproduced")
        H = pool.num_heads
        self.latent, self.pos_embed, self.latent_len, self.pool = (
            pool.latent,
            pool.pos_embed,
            pool.latent_len,
            pool.pool,
        )
        self.q = self._projection(pool.q, site.child("q"), H)
        self.kv = QuantLinear(pool.kv, site.child("kv"), weight_cuts={"head": (0, 2 * H)})
        self.attn = AttentionSites(site.child("attn"), H, pool.head_dim, pool.scale)
        self.q_norm, self.k_norm = pool.q_norm, pool.k_norm
        self.proj, self.proj_drop = swapped(pool.proj, site.child("proj")), pool.proj_drop
        self.norm = swapped(pool.norm, site.child("norm"))
        self.mlp = None if pool.mlp is None else swapped(pool.mlp, site.child("mlp"))
        if self.mlp is not None:
            self.mlp_residual_quant = site.activation("mlp_residual_quant", channel=(-1, pool.out_features))
        if not isinstance(self.q_norm, nn.Identity):
            raise_for_float_operands(site.prefix, self.kv, self.attn, "a norm changes")

    @staticmethod
    def _projection(linear: nn.Module, site: SiteBuilder, heads: int) -> nn.Module:
        """The layer of the queries, where they have one."""
        return QuantLinear(linear, site, {"head": (0, heads)}) if isinstance(linear, nn.Linear) else linear

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) to one vector for each image (B, C), or to all L of them where timm pools none."""
        B, N, _ = x.shape
        H, D, L = self.attn.num_heads, self.attn.head_dim, self.latent_len
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = self.q(self.latent.expand(B, -1, -1)).reshape(B, L, H, D).transpose(1, 2)
        k, v = self.kv(x).reshape(B, N, 2, H, D).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D)
        x = self.attn.attend(self.q_norm(q), self.k_norm(k), v, attn_mask).transpose(1, 2).flatten(2)  # (B, L, H * D)
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = self.mlp_residual_quant(x + self.mlp(self.norm(x)))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x

    def products(self) -> list[Product]:
        """The two products of attention; the layers state their own."""
        macs = partial(_macs, queries=self.latent_len, width=self.attn.attn_dim)
        return self.attn.operands(macs, lambda _: self.latent_len, "attn.")

    def links(self, name: str) -> list[NormLink]:
        """The LayerNorm before the MLP, of a pool called ``name``."""
        if not isinstance(self.norm, QuantLayerNorm) or self.mlp is None:
            return []
        source = f"{name}.proj.output_quant" if isinstance(self.proj, QuantLinear) and not self.proj_drop.p else None
        return [NormLink(f"{name}.norm", source, f"{name}.mlp.fc1")]


def _macs(shape: tuple[int, ...], queries: int, width: int) -> int:
    """Multiply-accumulates of either product, from the shape (B, N, C) of the tokens."""
    return shape[0] * shape[1] * queries * width
