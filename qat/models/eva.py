"""EVA of timm, and what timm builds as one: EVA-02, DINOv3, PE, ViTs with rotary positions. Shapes: see `tokens`.

H heads, D head width. Rotary positions turn q and k, so the sites of q and k are behind the rotation, where the product
is. The rotation itself, a table of sines and cosines, stays in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any, cast

import torch
from timm.layers import (
    AttentionRope,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed_cat,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.attention import raise_for_float_operands
from qat.models.biased import QuantBiasedHeads
from qat.models.stream import PostNormBlock, TwoSumBlock, scaled
from qat.models.tokens import QuantEmbedding, TokenFamily, require
from qat.sites.family import family
from qat.sites.insert import SiteBuilder, swaps

ROTATIONS = (RotaryEmbeddingCat, RotaryEmbeddingMixed, RotaryEmbeddingDinoV3)


class QuantEva(QuantEmbedding, Eva):
    """timm's class Eva, with the sites of its embedding."""

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches (B, P, C), or (B, h, w, C), to tokens (B, N, C) and the rotation of every patch."""
        if self.float_tokens:
            x, rope = super()._pos_embed(x)
            return self.embed_quant(x), rope
        rope = rotation(self, x.shape[1:3] if x.ndim == 4 else self.patch_embed.grid_size)
        return self.embed_quant(self.pos_drop(self.join(x))), rope


def rotation(model: Any, grid: Sequence[int]) -> Tensor | None:
    """Sines and cosines of every patch of a grid (h, w), or None; one for every block where timm mixes axes."""
    if model.rope is None:
        return None
    found: Tensor = model.rope.get_embed(shape=list(grid)) if model.dynamic_img_size else model.rope.get_embed()
    return found


def grid_of(model: Any, tokens: int) -> tuple[int, int]:
    """The grid (h, w) of the patches among as many tokens: the grid of the model, or a square one.

    Raises:
        QatError: neither has that many patches.
    """
    count, grid = tokens - model.num_prefix_tokens, model.patch_embed.grid_size
    if count == grid[0] * grid[1]:
        return cast(tuple[int, int], tuple(grid))
    side = isqrt(count)
    if side * side != count:
        raise QatError(f"{count} patches are neither a grid of {grid[0]} x {grid[1]} nor a square: give square images")
    return side, side


@family(Eva)
class EvaFamily(TokenFamily):
    """An EVA, with or without rotary positions."""

    blocks = (EvaBlock, EvaBlockPostNorm)
    attentions = (EvaAttention, AttentionRope)
    roots = (QuantEva,)

    def check(self, model: Eva) -> None:
        """Refuse, by name, a part that would compute products without a site, or another rotation."""
        super().check(model)
        if model.rope is not None:
            require(model, "rope", *ROTATIONS)

    def prepare(self, model: Eva, site: SiteBuilder) -> None:
        """Sites of the embedding; the rotation of dropped patches is left to timm."""
        super().prepare(model, site)
        for i, block in enumerate(model.blocks):
            attn = cast(QuantRotaryAttention, block.attn)
            if model.rope is not None or not isinstance(attn.q_norm, nn.Identity):
                raise_for_float_operands(f"blocks.{i}.attn.", attn.projection, attn, "rotation or a norm changes")
        quantized = cast(QuantEva, model)
        if model.patch_drop is not None and not quantized.float_tokens:
            raise QatError(
                "patch_drop_rate: with quantized tokens or positions it is not reproduced: leave it out of "
                "model.model_args, or set the sites tokens_quant and pos_embed_quant to null"
            )

    def embed(self, model: Eva, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the first block reads (B, N, C)."""
        return cast(Tensor, model.norm_pre(model._pos_embed(model.patch_embed(x))[0]))

    def block(self, model: Eva, index: int) -> Callable[[Tensor], Tensor]:
        """A block as a function of the stream (B, N, C) alone: it looks its rotation up by the number of tokens."""

        def run(x: Tensor) -> Tensor:
            rope = rotation(model, grid_of(model, x.shape[1]))
            mixed = rope is not None and model.rope_mixed
            return cast(Tensor, model.blocks[index](x, rope=rope[index] if mixed and rope is not None else rope))

        return run


@swaps(EvaBlock)
class QuantEvaBlock(TwoSumBlock):
    """The block of most EVAs."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) to (B, N, C); ``rope`` as `rotation` gives it."""
        branch = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x = self.attn_residual_quant(x + self.drop_path1(scaled(branch, self.gamma_1)))
        branch = scaled(self.mlp(self.norm2(x)), self.gamma_2)
        out: Tensor = self.mlp_residual_quant(x + self.drop_path2(branch))
        return out


@swaps(EvaBlockPostNorm)
class QuantEvaBlockPostNorm(PostNormBlock):
    """A block whose norms are at the end of its branches."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) to (B, N, C); ``rope`` as `rotation` gives it."""
        branch = self.norm1(self.attn(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal))
        x = self.attn_residual_quant(x + self.drop_path1(branch))
        out: Tensor = self.mlp_residual_quant(x + self.drop_path2(self.norm2(self.mlp(x))))
        return out


@swaps(EvaAttention)
@swaps(AttentionRope)
class QuantRotaryAttention(QuantBiasedHeads):
    """Self-attention of all tokens, in which the patches are rotated by their positions."""

    def __init__(self, attn: Any, site: SiteBuilder) -> None:
        if getattr(attn, "gate", None) is not None:
            raise QatError(f"{site.prefix}gate: gated attention is not reproduced")
        super().__init__(attn, site, attn.num_heads, attn.head_dim, getattr(attn, "num_kv_heads", None))
        self.q_norm, self.k_norm, self.norm = attn.q_norm, attn.k_norm, attn.norm
        self.prefix_tokens, self.rotate_half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) to (B, N, C); ``rope`` as `rotation` gives it."""
        q, k, v = self.heads(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope).type_as(v), self._rotated(k, rope).type_as(v)
        x = self.attend(q, k, v, attn_mask, is_causal)  # (B, H, N, D)
        out: Tensor = self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))
        return out

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys (B, H, N, D); tokens that are no patches have no position."""
        T = self.prefix_tokens
        return torch.cat([x[:, :, :T], apply_rot_embed_cat(x[:, :, T:], rope, half=self.rotate_half)], dim=2)
