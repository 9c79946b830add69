"""SReT, the sliced recursive transformer (arXiv 2111.05297), which timm lacks; registered with timm as ``sret_tiny``.

A stem of three convolutions is followed by stages with a depthwise pooling convolution between them. A stage applies
each of its blocks twice, with another MLP after every application: block 0, MLP 0, block 0, MLP 1, block 1, MLP 2, ...
Attention is within groups of tokens (`Grouping`). Shapes: B images, C channels, N tokens in raster order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise, starmap
from math import prod
from typing import Any

import torch
from timm.layers import Attention, DropPath, Mlp, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.grouping import Grouping, evaluation_order

EPS = 1e-6  # in every LayerNorm


class RecursiveBlock(nn.Module):
    """A transformer block that is applied twice; learned scalars weigh both sides of its two sums."""

    def __init__(self, dim: int, heads: int, hidden: int, drop_path: float, grouping: Grouping) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn, self.mlp = Attention(dim, heads, qkv_bias=True), Mlp(dim, hidden)
        self.grouping = grouping
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.coefficient1, self.coefficient2 = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.coefficient3, self.coefficient4 = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        """(B, N, C) to (B, N, C); ``again`` for the second application."""
        branch = self.grouping(self.attn, self.norm1(x), again)
        x = self.coefficient1 * x + self.coefficient2 * self.drop_path(branch)
        out: Tensor = self.coefficient3 * x + self.coefficient4 * self.drop_path(self.mlp(self.norm2(x)))
        return out


class NonProjection(nn.Module):
    """The MLP that follows an application of a block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.mlp = nn.LayerNorm(dim, eps=EPS), Mlp(dim, hidden)
        self.coefficient1, self.coefficient2 = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        out: Tensor = self.coefficient1 * x + self.coefficient2 * self.mlp(self.norm1(x))
        return out


class Stage(nn.Module):
    """Blocks, each applied twice, and an MLP after every application."""

    def __init__(self, blocks: Sequence[RecursiveBlock], mlps: Sequence[NonProjection]) -> None:
        super().__init__()
        self.blocks, self.mlps = nn.ModuleList(blocks), nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, H, W) to one of the same shape."""
        grid = x.shape[2:]
        x = as_tokens(x)
        for i in range(len(self.blocks)):
            x = self.apply_block(i, x)
        return as_map(x, grid)

    def apply_block(self, i: int, x: Tensor) -> Tensor:
        """Apply block i twice, each time with the MLP that follows: tokens (B, N, C) to (B, N, C)."""
        block = self.blocks[i]
        x = self.mlps[2 * i](block(x, again=False))
        out: Tensor = self.mlps[2 * i + 1](block(x, again=True))
        return out


def as_tokens(x: Tensor) -> Tensor:
    """A map (B, C, H, W) to tokens (B, N, C) in raster order."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens (B, N, C) to a map (B, C, H, W) of ``grid`` = (H, W)."""
    out: Tensor = x.transpose(1, 2).unflatten(2, tuple(grid))
    return out


class SReT(nn.Module):
    """SReT; the defaults are those of SReT-T.

    Args:
        img_size: height and width of the images.
        in_chans, num_classes: channels of an image, and outputs of the head; with 0 classes there is no head.
        embed_dims, depths, num_heads: C, blocks and heads of each stage.
        groups: groups of tokens in each stage, in the first and in the second application of its blocks.
        mlp_ratio: hidden width of the blocks over C.
        non_projection_ratio: hidden width of the MLPs after them, over C.
        drop_path_rate: the rate grows from 0 with the number of applications before a block, towards this one.
        eval_permutation: see `evaluation_order`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 5, 3),
        num_heads: Sequence[int] = (2, 4, 8),
        groups: Sequence[tuple[int, int]] = ((8, 2), (4, 1), (1, 1)),
        mlp_ratio: float = 3.6,
        non_projection_ratio: float = 1.0,
        drop_path_rate: float = 0.1,
        eval_permutation: str | int = "portable",
    ) -> None:
        super().__init__()
        if len({len(embed_dims), len(depths), len(num_heads), len(groups)}) > 1:
            raise QatError("embed_dims, depths, num_heads and groups differ in length: each has an entry per stage")
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.patch_embed = _stem(in_chans, embed_dims[0])
        self.pos_embed = nn.Parameter(torch.empty(1, embed_dims[0], *self.grid(0)))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.stages = nn.ModuleList()
        for s, (C, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            before = 2 * sum(depths[:s])  # applications
            blocks = [
                RecursiveBlock(C, heads, int(mlp_ratio * C), rate, Grouping(prod(self.grid(s)), groups[s]))
                for rate in (drop_path_rate * (before + j) / (2 * sum(depths)) for j in range(depth))
            ]
            mlps = [NonProjection(C, int(non_projection_ratio * C)) for _ in range(2 * depth)]
            self.stages.append(Stage(blocks, mlps))
        self.pools = nn.ModuleList(starmap(_pool, pairwise(embed_dims)))
        self.norm = nn.LayerNorm(self.num_features, eps=EPS)
        self.reset_classifier(num_classes)
        self.set_eval_permutation(eval_permutation)

    def set_eval_permutation(self, permutation: str | int) -> None:
        """Choose the order of the tokens in evaluation, see `evaluation_order`."""
        for index, grouping in enumerate(module for module in self.modules() if isinstance(module, Grouping)):
            grouping.order = evaluation_order(permutation, grouping.tokens, index)

    def grid(self, stage: int) -> list[int]:
        """Rows and columns of tokens; every stride of 2 rounds up."""
        return [-(-side // 2 ** (3 + stage)) for side in self.img_size]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers of timm leave undecayed."""
        return {"pos_embed"}

    def get_classifier(self) -> nn.Module:
        """Return the head, by the name that timm gives this method."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; ``global_pool`` is ignored, because the map is always averaged."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to the map (B, C, S / 8, S / 8) that the first stage reads."""
        if x.shape[-2:] != self.img_size:
            raise QatError(f"images of size {tuple(x.shape[-2:])} in a model of img_size {self.img_size}")
        out: Tensor = self.patch_embed(x) + self.pos_embed
        return out

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to a map (B, C, H, W)."""
        x = self.embed(x)
        for i, stage in enumerate(self.stages):
            x = stage(self.pools[i - 1](x) if i else x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map (B, C, H, W) to logits, or to the input of the head (B, C)."""
        x = self.norm(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to logits."""
        return self.forward_head(self.forward_features(x))


def _stem(channels: int, dim: int) -> nn.Sequential:
    """(B, 3, S, S) to (B, C, S / 8, S / 8)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (wide, out) in enumerate(((channels, dim // 2), (dim // 2, dim), (dim, dim)), 1):
        layers |= {f"conv{i}": nn.Conv2d(wide, out, 3, 2, 1), f"bn{i}": nn.BatchNorm2d(out), f"act{i}": nn.ReLU()}
    return nn.Sequential(layers)


def _pool(dim: int, out: int) -> nn.Sequential:
    """(B, C, H, W) to a map of half the side with ``out`` channels."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(dim, out, 3, 2, 1, groups=dim)))


default_cfgs = generate_default_cfgs({"sret_tiny": {
    "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True,
    "crop_pct": 224 / 256, "interpolation": "bilinear", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.conv1", "classifier": "head",
}})  # fmt: skip


@register_model
def sret_tiny(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-T: 4.76 million parameters, 1.1 GMACs."""
    return build_model_with_cfg(SReT, "sret_tiny", pretrained, **kwargs)
