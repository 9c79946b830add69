"""Blocks of timm's ViTs with parallel branches. Shapes: B images, N tokens, H heads, D head width, C channels.

`ParallelScalingBlock` (ViT-22B, arXiv 2302.05442) computes attention and MLP from one projection, beside each other;
`ParallelThingsBlock` (arXiv 2203.09795) has several attentions, and then several MLPs, beside each other.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

from qat.models.attention import AttentionSites, raise_for_float_operands
from qat.models.layers import QuantLinear
from qat.models.stream import Norm, StreamBlock, readers
from qat.sites.insert import SiteBuilder, swap_children, swapped, swaps
from qat.sites.products import Product


@swaps(ParallelScalingBlock)
class QuantParallelScalingBlock(StreamBlock):
    """One projection gives the hidden layer of the MLP and q, k and v; the stream has one sum.

    The sites of attention are those of ``attn``, which holds nothing else.
    """

    last = "joint_residual_quant"
    out_proj: nn.Module | None
    attn_out_proj: nn.Module
    mlp_out_proj: nn.Module

    def __init__(self, block: ParallelScalingBlock, site: SiteBuilder) -> None:
        super().__init__()
        H, D, C = block.num_heads, block.head_dim, block.in_proj.in_features
        self.in_split, self.mlp_bias = block.in_split, block.mlp_bias
        self.in_norm = swapped(block.in_norm, site.child("in_norm"))
        self.in_proj = QuantLinear(block.in_proj, site.child("in_proj"))
        self.attn = AttentionSites(site.child("attn"), H, D, block.scale, block.attn_drop)
        self.q_norm, self.k_norm = block.q_norm, block.k_norm
        self.mlp_drop, self.mlp_act = block.mlp_drop, block.mlp_act
        for name in ("out_proj", "attn_out_proj", "mlp_out_proj"):  # the first alone, or the others
            layer = getattr(block, name, None)
            setattr(self, name, layer and QuantLinear(layer, site.child(name)))
        self.ls, self.drop_path = block.ls, block.drop_path
        self.joint_residual_quant = site.activation("joint_residual_quant", channel=(-1, C))
        if not isinstance(block.q_norm, nn.Identity):
            raise_for_float_operands(f"{site.prefix}attn.", self.in_proj, self.attn, "a norm changes")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        hidden, q, k, v = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        q, k, v = (part.unflatten(-1, (self.attn.num_heads, -1)) for part in (q, k, v))  # (B, N, H, D)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        mixed = self.attn.attend(q, k, v, attn_mask, is_causal).transpose(1, 2).flatten(2)  # (B, N, H * D)
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if self.out_proj is not None:
            branch = self.out_proj(torch.cat((mixed, hidden), dim=-1))
        else:
            branch = self.attn_out_proj(mixed) + self.mlp_out_proj(hidden)
        out: Tensor = self.joint_residual_quant(x + self.drop_path(self.ls(branch)))
        return out

    def norms(self, before: str | None) -> list[Norm]:
        """The norm of both branches."""
        return [Norm("in_norm", before, ("in_proj",))]

    def products(self) -> list[Product]:
        """The two products of attention; the layers state their own."""
        return self.attn.operands(self.attn.self_attention, prefix="attn.")


@swaps(ParallelThingsBlock)
class QuantParallelThingsBlock(StreamBlock):
    """Attentions ``attns.j`` and MLPs ``ffns.j``, each with a norm of its own, and the two sums of a ViT block."""

    def __init__(self, block: ParallelThingsBlock, site: SiteBuilder) -> None:
        super().__init__()
        first: Any = block.attns[0]
        C = first.attn.qkv.in_features
        self.attns, self.ffns = block.attns, block.ffns
        swap_children(self, site)
        self.attn_residual_quant = site.activation("attn_residual_quant", channel=(-1, C))
        self.mlp_residual_quant = site.activation("mlp_residual_quant", channel=(-1, C))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        branches = []
        part: Any
        for part in self.attns:
            branch = part.attn(part.norm(x), attn_mask=attn_mask, is_causal=is_causal)
            branches.append(part.drop_path(part.ls(branch)))
        x = self.attn_residual_quant(x + torch.stack(branches).sum(dim=0))
        out: Tensor = self.mlp_residual_quant(x + torch.stack([part(x) for part in self.ffns]).sum(dim=0))
        return out

    def norms(self, before: str | None) -> list[Norm]:
        """A norm before each attention, and one before each MLP."""
        attns = [(f"attns.{j}.norm", before, readers(self, f"attns.{j}.attn")) for j in range(len(self.attns))]
        middle = "attn_residual_quant"
        ffns = [(f"ffns.{j}.norm", middle, readers(self, f"ffns.{j}.mlp")) for j in range(len(self.ffns))]
        return [Norm(*norm) for norm in (*attns, *ffns)]
