"""SReT, quantized. Shapes: B images, N tokens, C channels.

A block is applied twice, and its sites serve both applications: calibration uses the tensors of both, and training adds
the gradients of both.

The attention inside a block is timm's `Attention`, as in a ViT, and it is replaced by the same class. Groups of tokens
reach it as a batch; everything outside it works per token, so the order of the tokens matters nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import Attention
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.sret_float import NonProjection, RecursiveBlock, SReT, as_map, as_tokens
from qat.sites.family import Family, NormLink, Unit, family
from qat.sites.insert import SiteBuilder, swap_children, swaps


@family(SReT)
class SReTFamily(Family):
    """Checks, LayerNorms and units of an SReT."""

    def check(self, model: SReT) -> None:
        """Refuse, by name, a block or an attention of another class."""
        stage: Any
        for s, stage in enumerate(model.stages):
            for i, block in enumerate(stage.blocks):
                place = f"stages.{s}.blocks.{i}"
                if type(block) is not RecursiveBlock:
                    raise QatError(f"{place} is a {type(block).__name__}: only RecursiveBlock is reproduced")
                if type(block.attn) is not Attention:
                    kind = type(block.attn).__name__
                    raise QatError(f"{place}.attn is a {kind}: only timm's Attention is reproduced")

    def norm_links(self, model: SReT) -> list[NormLink]:
        """Two LayerNorms in every block, one in every MLP, and the last; the first of a block has two sources."""
        links = []
        stage: Any
        for s, stage in enumerate(model.stages):
            for i in range(len(stage.blocks)):
                block, mlps = f"stages.{s}.blocks.{i}", [f"stages.{s}.mlps.{j}" for j in (2 * i, 2 * i + 1)]
                links.append(NormLink(f"{block}.norm1", None, f"{block}.attn.qkv"))
                links.append(NormLink(f"{block}.norm2", f"{block}.attn_residual_quant", f"{block}.mlp.fc1"))
                links += [NormLink(f"{mlp}.norm1", f"{block}.mlp_residual_quant", f"{mlp}.mlp.fc1") for mlp in mlps]
        return [*links, NormLink("norm", None, None)]

    def units(self, model: SReT) -> list[Unit]:
        """Embedding, every pooling, every block with its two MLPs, head; between them are tokens (B, N, C)."""
        units = [Unit("embedding", lambda x: as_tokens(model.embed(x)), ("patch_embed",), ("pos_embed",))]
        stage: Any
        for s, stage in enumerate(model.stages):
            if s:
                name = f"pools.{s - 1}"
                units.append(Unit(name, partial(_pool_tokens, model.pools[s - 1], model.grid(s - 1)), (name,)))
            for i in range(len(stage.blocks)):
                names = (f"blocks.{i}", f"mlps.{2 * i}", f"mlps.{2 * i + 1}")
                modules = tuple(f"stages.{s}.{name}" for name in names)
                units.append(Unit(modules[0], partial(stage.apply_block, i), modules))
        last = model.grid(len(model.stages) - 1)
        return [*units, Unit("head", lambda x: model.forward_head(as_map(x, last)), ("norm", "head"))]


def _pool_tokens(pool: nn.Module, grid: Sequence[int], x: Tensor) -> Tensor:
    """Tokens (B, N, C) of one stage to those of the next."""
    return as_tokens(pool(as_map(x, grid)))


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
