"""Quantized attention that every family shares. Shapes: B batch (images, windows), H heads, N tokens, D head width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.layers import QuantLinear
from qat.quantizers import Quantizer, recompute_operands
from qat.sites.insert import Cuts, FloatSite, SiteBuilder
from qat.sites.products import Matrices, Product, same

Macs = Callable[[tuple[int, ...]], int]
QUANTIZED = FloatSite()  # in place of the site of a tensor that is quantized already


def _tokens(x: Tensor) -> int:
    return x.shape[2]


class AttentionSites(nn.Module):
    """Scaled dot-product attention of several heads with a site on every operand of its products.

    The scores are written out, because fused attention has no place for ``probs_quant``; it is used where neither
    scores nor probabilities are quantized. A quantizer at ``probs_quant`` that replaces softmax is given the scores.

    Args:
        site: builder for the sites.
        heads: H.
        width: D.
        scale: factor of the scores.
        drop: dropout of the probabilities; None for none.
        kv_heads: heads of keys and values, a divisor of H, each of which serves as many queries; None for H.
    """

    def __init__(
        self, site: SiteBuilder, heads: int, width: int, scale: float, drop: nn.Dropout | None = None,
        kv_heads: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.add_sites(site, heads, width, scale, drop, kv_heads)

    def add_sites(
        self, site: SiteBuilder, heads: int, width: int, scale: float, drop: nn.Dropout | None = None,
        kv_heads: int | None = None,
    ) -> None:  # fmt: skip
        """What the constructor does, for a subclass whose sites do not come first."""
        H, D, K = heads, width, kv_heads or heads
        self.num_heads, self.head_dim, self.attn_dim, self.scale, self.repeats = H, D, H * D, scale, H // K
        self.q_quant = site.activation("q_quant", head=(1, H), channel=(-1, D))
        self.k_quant = site.activation("k_quant", head=(1, K), channel=(-1, D))
        self.v_quant = site.activation("v_quant", head=(1, K), channel=(-1, D))
        self.scores_quant = site.activation("scores_quant", head=(1, H))
        self.probs_quant = site.activation("probs_quant", head=(1, H))
        self.attn_drop: nn.Dropout = drop or nn.Dropout(0.0)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q (B, H, N, D), k and v (B, K, N, D) to (B, H, N, D).

        Args:
            q, k, v: queries, keys and values, which fewer heads may have.
            mask: (B, 1 or H, N, N), added to the scores, or boolean: False where a token does not attend to another.
            is_causal: a token attends only to itself and to those before it; there is no mask then.
            bias: added to the scores (1 or B, H, N, N).
        """
        if isinstance(self.scores_quant, FloatSite) and isinstance(self.probs_quant, FloatSite):
            dropout = self.attn_drop.p if self.training else 0.0
            q, k, v = self.q_quant(q), self._repeat(self.k_quant(k)), self._repeat(self.v_quant(v))
            mask = _sum(bias, mask)
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)
        scores = recompute_operands(self._scores, (self.q_quant, q), (self.k_quant, k))  # (B, H, N, N)
        scores = self.scores_quant(scores)
        mask = additive(mask, is_causal, scores)  # after scores_quant, which would clip -inf
        if self.softmax_is_quantized:
            probs = self.probs_quant(scores if bias is None else scores + bias, mask)
            return recompute_operands(self._mix, (QUANTIZED, probs), (self.v_quant, v))
        mask = _sum(bias, mask)
        probs = (scores if mask is None else scores + mask).softmax(-1)
        return recompute_operands(self._mix, (self.probs_quant, probs), (self.v_quant, v))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scale inside the product: q * scale would be one more tensor to keep for backward."""
        flat, zero = (q.flatten(0, 1), self._repeat(k).flatten(0, 1).transpose(1, 2)), q.new_zeros(())
        scores: Tensor = torch.baddbmm(zero, *flat, beta=0, alpha=self.scale).unflatten(0, q.shape[:2])
        return scores

    def _mix(self, probs: Tensor, v: Tensor) -> Tensor:
        dropped: Tensor = self.attn_drop(probs)
        return dropped @ self._repeat(v)

    def _repeat(self, x: Tensor) -> Tensor:
        """Keys or values (B, K, N, D) to one for every head of queries (B, H, N, D)."""
        return x if self.repeats == 1 else x.repeat_interleave(self.repeats, dim=1)

    @property
    def softmax_is_quantized(self) -> bool:
        """Whether the quantizer at ``probs_quant`` replaces softmax: it is given scores, not probabilities."""
        return isinstance(self.probs_quant, Quantizer) and self.probs_quant.replaces_softmax

    def operands(self, macs: Macs, rows_of: Callable[[Tensor], int] = _tokens, prefix: str = "") -> list[Product]:
        """q (B, H, N, D) with k, without their scale; the probabilities (B, H, N, N) with v, transposed.

        Args:
            macs: multiply-accumulates of either product, from the shape of an input of the module that states them.
            rows_of: the number of queries of a sample.
            prefix: dotted name of this module in that one, with a dot at its end.
        """
        scores = Matrices(same, same, (1, 1), same, rows_of)
        mixed = Matrices(same, lambda x: x.mT, (1, 1), same, rows_of)
        shared = self.repeats > 1  # a head of keys then has rows of several matrices
        return [
            Product(f"{prefix}q_quant", f"{prefix}k_quant", macs, None if shared else scores),
            Product(
                f"{prefix}probs_quant", f"{prefix}v_quant", macs, None if shared or self.softmax_is_quantized else mixed
            ),
        ]

    def self_attention(self, shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of either product where N tokens attend to each other, from the shape (B, N, C)."""
        return shape[0] * shape[1] ** 2 * self.attn_dim


class QuantHeads(AttentionSites):
    """Self-attention whose q, k and v come from one projection.

    A subclass computes q, k and v from its input and decides which tokens attend to which.

    Args:
        attn: float attention with ``qkv``, ``proj`` and ``attn_drop``, whose parameters are shared.
        site: builder for the sites.
        heads: H.
        width: D.
        scale: factor of the scores.
    """

    fused_projection = True  # rows of the weight of ``qkv`` are q, k and v, each by head; no position turns them later

    def __init__(self, attn: Any, site: SiteBuilder, heads: int, width: int, scale: float) -> None:
        nn.Module.__init__(self)
        H = heads
        self.qkv = QuantLinear(attn.qkv, site.child("qkv"), weight_cuts=qkv_cuts(H))
        self.add_sites(site, heads, width, scale, attn.attn_drop)
        self.proj = QuantLinear(attn.proj, site.child("proj"), {"head": (1, H)}, {"head": (-1, H)})

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to q, k and v, each (B, H, N, D)."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def products(self) -> list[Product]:
        """The scores, and the probabilities with the values."""
        return self.operands(self.self_attention)


def qkv_cuts(heads: int) -> Cuts:
    """Granularities of the rows of a weight (3 * H * D, C) that computes q, k and v."""
    return {"qkv": (0, 3), "head": (0, 3 * heads)}


def pair_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The entry of a table for every pair of tokens of a grid (h, w).

    timm looks it up by integers in a buffer, which a weight average rounds down: 0.9999 * 11 + 0.0001 * 11 becomes 10.

    Args:
        table: for every relative position, rows first ((2 h - 1) * (2 w - 1), H).
        grid: h and w.

    Returns:
        (H, h * w, h * w).
    """
    h, w = grid
    table = table.unflatten(0, (2 * h - 1, 2 * w - 1))  # (down, right, H)
    pairs = table.unfold(0, h, 1).unfold(1, w, 1).flip(3, 4).permute(2, 0, 1, 3, 4)  # (H, h, w, h, w)
    return pairs.reshape(-1, h * w, h * w)


def raise_for_float_operands(prefix: str, projection: nn.Module, sites: AttentionSites, what: str) -> None:
    """Refuse a recipe that quantizes q and k only before something changes them.

    Args:
        prefix: name of the attention, with a dot at its end.
        projection: computes q, k or both.
        sites: of the same attention.
        what: the change, as the subject and verb of a sentence.

    Raises:
        QatError: the output of the projection is quantized, and q or k at the product is not.
    """
    for name in ("q_quant", "k_quant"):
        if isinstance(projection.output_quant, Quantizer) and isinstance(getattr(sites, name), FloatSite):
            raise QatError(
                f"site '{prefix}{name}' is not quantized, but {what} q and k after their projection: add the rule "
                "{match: '*.attn.[qk]_quant', spec: ...}, or leave the output of the projection in floating point"
            )


def _sum(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return mask if bias is None else bias if mask is None else bias + mask


def additive(mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """The mask as a summand of the scores, or None."""
    if is_causal:
        return scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
    if mask is not None and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return mask
