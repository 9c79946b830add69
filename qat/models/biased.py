"""Projections to q, k and v whose biases are parameters of the attention, as EVA and BEiT have them.

Shapes: B images, N tokens, H heads, K of keys and values, D head width, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.models.attention import AttentionSites, qkv_cuts
from qat.models.layers import QuantLinear
from qat.sites.insert import SiteBuilder
from qat.sites.products import Product


class QuantBiasedHeads(AttentionSites):
    """Self-attention with one projection ``qkv``, or with ``q_proj``, ``k_proj`` and ``v_proj``.

    The bias of ``qkv`` is [q_bias; 0; v_bias], without one for the keys, or the layer has its own.

    Args:
        attn: float attention, whose parameters are shared.
        site: builder for the sites.
        heads: H.
        width: D.
        kv_heads: K; None for H.
    """

    q_bias: nn.Parameter | None
    k_bias: Tensor | None
    v_bias: nn.Parameter | None

    def __init__(self, attn: Any, site: SiteBuilder, heads: int, width: int, kv_heads: int | None = None) -> None:
        nn.Module.__init__(self)
        H, K = heads, kv_heads or heads
        self.qkv = None
        if attn.qkv is not None:
            self.qkv = QuantLinear(attn.qkv, site.child("qkv"), weight_cuts=qkv_cuts(H))
        else:
            self.q_proj = QuantLinear(attn.q_proj, site.child("q_proj"), {"head": (0, H)})
            self.k_proj = QuantLinear(attn.k_proj, site.child("k_proj"), {"head": (0, K)})
            self.v_proj = QuantLinear(attn.v_proj, site.child("v_proj"), {"head": (0, K)})
        self.q_bias, self.v_bias = getattr(attn, "q_bias", None), getattr(attn, "v_bias", None)
        self.register_buffer("k_bias", getattr(attn, "k_bias", None), persistent=False)
        self.add_sites(site, H, width, attn.scale, attn.attn_drop, K)
        self.proj = QuantLinear(attn.proj, site.child("proj"), {"head": (1, H)}, {"head": (-1, H)})
        self.proj_drop = attn.proj_drop

    @property
    def projection(self) -> QuantLinear:
        """The layer that computes q."""
        return self.q_proj if self.qkv is None else self.qkv

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to q (B, H, N, D) and to k and v (B, K, N, D)."""
        B, N, _ = x.shape
        if self.qkv is None:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (layer(x).reshape(B, N, -1, self.head_dim).transpose(1, 2) for layer in layers)
            return q, k, v
        parts = [part for part in (self.q_bias, self.k_bias, self.v_bias) if part is not None]
        qkv = self.qkv(x, torch.cat(parts) if parts else None).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def products(self) -> list[Product]:
        """The scores, and the probabilities with the values."""
        return self.operands(self.self_attention)
