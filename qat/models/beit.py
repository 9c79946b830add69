"""BEiT of timm (arXiv 2106.08254). Shapes: see `qat.models.tokens`; H heads, D head width.

Attention adds a learned bias for the relative position of every pair of tokens to the scores, in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import beit
from torch import Tensor

from qat.errors import QatError
from qat.models.attention import pair_bias
from qat.models.biased import QuantBiasedHeads
from qat.models.stream import TwoSumBlock, scaled
from qat.models.tokens import QuantEmbedding, TokenFamily
from qat.sites.family import family
from qat.sites.insert import SiteBuilder, swaps


class QuantBeit(QuantEmbedding, beit.Beit):
    """timm's class Beit, with the sites of its embedding."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, C)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the first block reads (B, N, C)."""
        out: Tensor = self.embed_quant(self.pos_drop(self.join(self.patch_embed(x))))
        return out


@family(beit.Beit)
class BeitFamily(TokenFamily):
    """A BEiT whose blocks have a position bias each."""

    blocks = (beit.Block,)
    attentions = (beit.Attention,)
    roots = (QuantBeit,)

    def check(self, model: beit.Beit) -> None:
        """Refuse, by name, a part that would compute products without a site, or a bias that blocks share."""
        super().check(model)
        if model.rel_pos_bias is not None:
            raise QatError("rel_pos_bias: a position bias that all blocks share is not reproduced, one for each is")

    def embed(self, model: Any, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the first block reads (B, N, C)."""
        out: Tensor = model.embed(x)
        return out


@swaps(beit.Block)
class QuantBeitBlock(TwoSumBlock):
    """A block with sites on the residual stream (B, N, C) after each of its two sums."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        branch = scaled(self.attn(self.norm1(x)), self.gamma_1)
        x = self.attn_residual_quant(x + self.drop_path1(branch))
        branch = scaled(self.mlp(self.norm2(x)), self.gamma_2)
        out: Tensor = self.mlp_residual_quant(x + self.drop_path2(branch))
        return out


@swaps(beit.Attention)
class QuantBeitAttention(QuantBiasedHeads):
    """Self-attention of all tokens, with a bias for their relative position where timm has one."""

    def __init__(self, attn: Any, site: SiteBuilder) -> None:
        H = attn.num_heads
        super().__init__(attn, site, H, attn.proj.in_features // H)
        self.relative_position_bias_table, self.grid = attn.relative_position_bias_table, attn.window_size
        if self.relative_position_bias_table is not None:
            self.relative_position_bias_table_quant = site.weight("relative_position_bias_table_quant", channel=(-1, H))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = self.attend(*self.heads(x), bias=self.position_bias()).transpose(1, 2).flatten(2)  # (B, N, H * D)
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def position_bias(self) -> Tensor | None:
        """The entry of the table for every pair of tokens (1, H, N, N).

        The last three rows of the table are for the class token: to a patch, from a patch, to itself.
        """
        if self.relative_position_bias_table is None:
            return None
        table = self.relative_position_bias_table_quant(self.relative_position_bias_table)
        pairs = pair_bias(table[:-3], self.grid)  # (H, P, P)
        to_patch, from_patch, itself = (row[:, None, None] for row in table[-3:])  # (H, 1, 1) each
        first = torch.cat([itself, to_patch.expand(-1, 1, pairs.shape[2])], 2)
        return torch.cat([first, torch.cat([from_patch.expand(-1, pairs.shape[1], 1), pairs], 2)], 1).unsqueeze(0)
