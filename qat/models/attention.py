"""Quantized attention that every family shares. Shapes: B batch (images, windows), H heads, N tokens, D head width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.models.layers import QuantLinear
from qat.quantizers import Quantizer, recompute_operands
from qat.sites.insert import Cuts, FloatSite, SiteBuilder
from qat.sites.products import Matrices, Product, same

QUANTIZED = FloatSite()  # in place of the site of a tensor that is quantized already


class QuantHeads(nn.Module):
    """Scaled dot-product attention of several heads with a site on every operand of its products.

    A subclass computes q, k and v from its input and decides which tokens attend to which. The scores are written out,
    because fused attention has no place for ``probs_quant``; it is used where neither scores nor probabilities are
    quantized. A quantizer at ``probs_quant`` that replaces softmax is given the scores.

    Args:
        attn: float attention with ``qkv``, ``proj`` and ``attn_drop``, whose parameters are shared.
        site: builder for the sites.
        heads: H.
        width: D.
        scale: factor of the scores.
    """

    def __init__(self, attn: Any, site: SiteBuilder, heads: int, width: int, scale: float) -> None:
        super().__init__()
        H, D = heads, width
        self.num_heads, self.head_dim, self.attn_dim, self.scale = H, D, H * D, scale
        cuts: Cuts = {"qkv": (0, 3), "head": (0, 3 * H)}
        self.qkv = QuantLinear(attn.qkv, site.child("qkv"), weight_cuts=cuts)
        self.q_quant = site.activation("q_quant", head=(1, H), channel=(-1, D))
        self.k_quant = site.activation("k_quant", head=(1, H), channel=(-1, D))
        self.v_quant = site.activation("v_quant", head=(1, H), channel=(-1, D))
        self.scores_quant = site.activation("scores_quant", head=(1, H))
        self.probs_quant = site.activation("probs_quant", head=(1, H))
        self.attn_drop: nn.Dropout = attn.attn_drop
        self.proj = QuantLinear(attn.proj, site.child("proj"), {"head": (1, H)}, {"head": (-1, H)})

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to q, k and v, each (B, H, N, D)."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q, k and v (B, H, N, D) to (B, H, N, D).

        Args:
            q, k, v: queries, keys and values.
            mask: (B, 1 or H, N, N), added to the scores, or boolean: False where a token does not attend to another.
            is_causal: a token attends only to itself and to those before it; there is no mask then.
            bias: added to the scores (1 or B, H, N, N).
        """
        if isinstance(self.scores_quant, FloatSite) and isinstance(self.probs_quant, FloatSite):
            dropout = self.attn_drop.p if self.training else 0.0
            q, k, v = self.q_quant(q), self.k_quant(k), self.v_quant(v)
            mask = _sum(bias, mask)
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)
        scores = recompute_operands(self._scores, (self.q_quant, q), (self.k_quant, k))  # (B, H, N, N)
        scores = self.scores_quant(scores)
        mask = _additive(mask, is_causal, scores)  # after scores_quant, which would clip -inf
        if self.softmax_is_quantized:
            probs = self.probs_quant(scores if bias is None else scores + bias, mask)
            return recompute_operands(self._mix, (QUANTIZED, probs), (self.v_quant, v))
        mask = _sum(bias, mask)
        probs = (scores if mask is None else scores + mask).softmax(-1)
        return recompute_operands(self._mix, (self.probs_quant, probs), (self.v_quant, v))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scale inside the product: q * scale would be one more tensor to keep for backward."""
        flat, zero = (q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), q.new_zeros(())
        scores: Tensor = torch.baddbmm(zero, *flat, beta=0, alpha=self.scale).unflatten(0, q.shape[:2])
        return scores

    def _mix(self, probs: Tensor, v: Tensor) -> Tensor:
        dropped: Tensor = self.attn_drop(probs)
        return dropped @ v

    @property
    def softmax_is_quantized(self) -> bool:
        """Whether the quantizer at ``probs_quant`` replaces softmax: it is given scores, not probabilities."""
        return isinstance(self.probs_quant, Quantizer) and self.probs_quant.replaces_softmax

    def products(self) -> list[Product]:
        """q (B, H, N, D) with k, without their scale; the probabilities (B, H, N, N) with v, transposed."""
        scores = Matrices(same, same, (1, 1), same, _tokens)
        mixed = None if self.softmax_is_quantized else Matrices(same, lambda x: x.mT, (1, 1), same, _tokens)
        return [
            Product("q_quant", "k_quant", self._macs, scores),
            Product("probs_quant", "v_quant", self._macs, mixed),
        ]

    def _macs(self, shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of either product, from the shape (B, N, C) of an input."""
        return shape[0] * shape[1] ** 2 * self.attn_dim


def _tokens(x: Tensor) -> int:
    return x.shape[2]


def _sum(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return mask if bias is None else bias if mask is None else bias + mask


def _additive(mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """The mask as a summand of the scores, or None."""
    if is_causal:
        return scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
    if mask is not None and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return mask
