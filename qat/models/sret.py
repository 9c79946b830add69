"""SReT, quantized. Shapes: B images, N tokens, C channels.

A block is applied twice and its sites serve both applications. Calibration therefore samples the tensors of both, each
as it samples that of another site; training adds the gradients of both.

The attention inside a block is timm's `Attention`, as in a ViT, and so is what replaces it. Groups of tokens come to it
as a batch; everything outside it works per token, so that the order of the tokens matters nowhere else.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.sret_float import NonProjection, RecursiveBlock, SReT
from qat.sites.family import Family, family
from qat.sites.insert import SiteBuilder, swap_children, swaps


@family(SReT)
class SReTFamily(Family):
    """What is said of an SReT as a whole; it is no chain of units, because a block is applied twice."""

    def check(self, model: SReT) -> None:
        """Refuse, by name, a block or an attention that was put in the place of ours."""
        stage: Any
        for s, stage in enumerate(model.stages):
            for i, block in enumerate(stage.blocks):
                place = f"stages.{s}.blocks.{i}"
                if type(block) is not RecursiveBlock:
                    raise QatError(f"{place} is a {type(block).__name__}: only RecursiveBlock is reproduced")
                if type(block.attn) is not Attention:
                    kind = type(block.attn).__name__
                    raise QatError(f"{place}.attn is a {kind}: only timm's Attention is reproduced")


@swaps(RecursiveBlock)
class QuantRecursiveBlock(nn.Module):
    """The block with sites on the residual stream (B, N, C) after each of its two sums."""

    def __init__(self, block: RecursiveBlock, site: SiteBuilder) -> None:
        super().__init__()
        C = block.norm1.normalized_shape[0]
        self.norm1, self.attn, self.grouping = block.norm1, block.attn, block.grouping
        self.norm2, self.mlp, self.drop_path = block.norm2, block.mlp, block.drop_path
        self.coefficient1, self.coefficient2 = block.coefficient1, block.coefficient2
        self.coefficient3, self.coefficient4 = block.coefficient3, block.coefficient4
        swap_children(self, site)
        self.attn_residual_quant = site.activation("attn_residual_quant", channel=(-1, C))
        self.mlp_residual_quant = site.activation("mlp_residual_quant", channel=(-1, C))

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C); ``again`` for the second application."""
        branch = self.drop_path(self.grouping(self.attn, self.norm1(x), again))
        x = self.attn_residual_quant(self.coefficient1 * x + self.coefficient2 * branch)
        branch = self.drop_path(self.mlp(self.norm2(x)))
        out: Tensor = self.mlp_residual_quant(self.coefficient3 * x + self.coefficient4 * branch)
        return out


@swaps(NonProjection)
class QuantNonProjection(nn.Module):
    """The MLP with a site on the residual stream (B, N, C) after its sum."""

    def __init__(self, block: NonProjection, site: SiteBuilder) -> None:
        super().__init__()
        C = block.norm1.normalized_shape[0]
        self.norm1, self.mlp = block.norm1, block.mlp
        self.coefficient1, self.coefficient2 = block.coefficient1, block.coefficient2
        swap_children(self, site)
        self.mlp_residual_quant = site.activation("mlp_residual_quant", channel=(-1, C))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        out: Tensor = self.mlp_residual_quant(self.coefficient1 * x + self.coefficient2 * self.mlp(self.norm1(x)))
        return out
