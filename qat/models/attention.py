"""What the attention of every family shares. Shapes: B batch (images, windows), H heads, N tokens, D head width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.describe import Product
from qat.insert import Cuts, SiteBuilder
from qat.models.layers import QuantLinear
from qat.quantizers import FloatSite, LogIntSoftmaxQuantizer, product

DONE = FloatSite()  # of a tensor that is quantised already


class QuantHeads(nn.Module):
    """Scaled dot-product attention of several heads with a site on every operand of its products.

    A subclass makes q, k and v of its input and says which tokens see which. The scores are written out, because fused
    attention has no place for ``probs_quant``; while neither scores nor probabilities are quantised, it is used.
    A `LogIntSoftmax` at ``probs_quant`` takes the place of the softmax itself.

    Args:
        attn: float attention with ``qkv``, ``proj`` and ``attn_drop``, whose parameters are shared.
        site: builder for the sites.
        heads: H.
        width: D.
        scale: of the scores.
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
            mask: tokens that do not see each other: boolean, or added to the scores (B, 1 or H, N, N).
            is_causal: a token sees those before it, in place of a mask.
            bias: a part of the scores (1 or B, H, N, N).
        """
        if isinstance(self.scores_quant, FloatSite) and isinstance(self.probs_quant, FloatSite):
            dropout = self.attn_drop.p if self.training else 0.0
            q, k, v = self.q_quant(q), self.k_quant(k), self.v_quant(v)
            mask = _sum(bias, mask)
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)
        scores = self.scores_quant(product(self._scores, (self.q_quant, q), (self.k_quant, k)))  # (B, H, N, N)
        mask = _additive(mask, is_causal, scores)  # after scores_quant, which would clip -inf
        if isinstance(self.probs_quant, LogIntSoftmaxQuantizer):
            probs = self.probs_quant(scores if bias is None else scores + bias, mask)
            return product(self._mix, (DONE, probs), (self.v_quant, v))
        mask = _sum(bias, mask)
        probs = (scores if mask is None else scores + mask).softmax(-1)
        return product(self._mix, (self.probs_quant, probs), (self.v_quant, v))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scale inside the product: q * scale would be one more tensor to keep for backward."""
        flat, zero = (q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), q.new_zeros(())
        scores: Tensor = torch.baddbmm(zero, *flat, beta=0, alpha=self.scale).unflatten(0, q.shape[:2])
        return scores

    def _mix(self, probs: Tensor, v: Tensor) -> Tensor:
        dropped: Tensor = self.attn_drop(probs)
        return dropped @ v

    def products(self, shape: tuple[int, ...]) -> list[Product]:
        """The two products between tokens, from the shape (B, N, C) of an input."""
        macs = shape[0] * shape[1] ** 2 * self.attn_dim
        return [Product(macs, "q_quant", "k_quant"), Product(macs, "probs_quant", "v_quant")]


def _sum(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return mask if bias is None else bias if mask is None else bias + mask


def _additive(mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """A mask to add to the scores, or None."""
    if is_causal:
        return scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
    if mask is not None and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return mask
