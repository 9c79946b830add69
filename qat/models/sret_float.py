"""SReT, the sliced recursive transformer (arXiv 2111.05297), which timm lacks; registered with timm as ``sret_tiny``.

A stem of three convolutions, then stages with a depthwise pooling convolution between them. A stage applies each of its
blocks twice and puts an MLP of its own after every application: block 0, MLP 0, block 0, MLP 1, block 1, MLP 2, ...
A token attends within a group of neighbours. Before the second application the tokens are shuffled, so that the groups
are others; the official model does so in evaluation too, where here an order is fixed (`evaluation_order`).

Shapes: B images, C channels, N tokens in raster order, G groups of tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise, starmap
from math import prod
from typing import Any

import torch
from timm.layers import Attention, DropPath, Mlp, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from qat.errors import QatError

EPS = 1e-6  # of every LayerNorm


def evaluation_order(permutation: str | int, tokens: int, index: int) -> Tensor | None:
    """An order (N,) of the tokens for the block ``index`` of a model; None is their own.

    Args:
        permutation: ``portable`` (a formula, the same in every language and on every device), ``identity``, or the
            seed of a random draw.
        tokens: N.
        index: counts the blocks of all stages from 0.
    """
    if permutation == "portable":
        i = torch.arange(tokens, device="cpu")
        return ((31 * i * i + 7919 * i + 104729 * (index + 1)) % 10007).argsort(stable=True)
    if permutation == "identity":
        return None
    if isinstance(permutation, bool) or not isinstance(permutation, int):
        raise QatError(f"eval_permutation is {permutation!r}: choose portable, identity, or an integer as seed")
    generator = torch.Generator().manual_seed(1000 * permutation + index)  # no model has a thousand blocks
    return torch.randperm(tokens, generator=generator, device="cpu")


class Grouping(nn.Module):
    """Attention within groups of N / G tokens: of neighbours, or, in the second application, of shuffled ones.

    The groups are folded into the batch, so the attention itself is that of any transformer.

    Args:
        tokens: N.
        groups: G of the first and of the second application; where G = 1 nothing is shuffled.
        order: of the tokens (N,) in evaluation, None for their own; training draws one from torch's global generator
            in every call.
    """

    def __init__(self, tokens: int, groups: tuple[int, int], order: Tensor | None = None) -> None:
        super().__init__()
        for G in groups:
            if G < 1 or tokens % G:
                raise QatError(f"{tokens} tokens cannot be cut into {G} equal groups: change img_size or groups")
        self.tokens, self.groups = tokens, groups
        self.order = order  # not a buffer: a weight average would average it, and cut the integers

    def forward(self, attn: Callable[[Tensor], Tensor], x: Tensor, again: bool) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        (B, N, C), G = x.shape, self.groups[again]
        order = self.draw(x) if again and G > 1 else None
        x = x if order is None else x.index_select(1, order)
        x = attn(x.reshape(B * G, N // G, C)).reshape(B, N, C)
        return x if order is None else x.index_select(1, order.argsort())

    def draw(self, x: Tensor) -> Tensor | None:
        """The order of the tokens, on the device of ``x``."""
        if self.training:
            return torch.randperm(self.tokens, device=x.device)
        return None if self.order is None else self.order.to(x.device)


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
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        for i, mlp in enumerate(self.mlps):
            x = mlp(self.blocks[i // 2](x, again=i % 2 == 1))
        return x.transpose(1, 2).reshape(shape)


class SReT(nn.Module):
    """SReT; the defaults are those of SReT-T.

    Args:
        img_size: of the square images.
        in_chans, num_classes: channels of an image and outputs of the head, which 0 leaves out.
        embed_dims, depths, num_heads: C, blocks and heads of each stage.
        groups: G of each stage in the first and in the second application of its blocks.
        mlp_ratio: hidden width of the blocks over C.
        non_projection_ratio: likewise of the MLPs after them.
        drop_path_rate: rises with the applications before a block, from 0.
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
        self.pos_embed = nn.Parameter(torch.empty(1, embed_dims[0], *self._grid(0)))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.stages = nn.ModuleList()
        for s, (C, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            before = 2 * sum(depths[:s])  # applications
            blocks = [
                RecursiveBlock(C, heads, int(mlp_ratio * C), rate, Grouping(prod(self._grid(s)), groups[s]))
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

    def _grid(self, stage: int) -> list[int]:
        """Rows and columns of tokens; every stride of 2 rounds up."""
        return [-(-side // 2 ** (3 + stage)) for side in self.img_size]

    def no_weight_decay(self) -> set[str]:
        """Names for timm's optimizers."""
        return {"pos_embed"}

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; the map is averaged in any case."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to a map (B, C, H, W)."""
        if x.shape[-2:] != self.img_size:
            raise QatError(f"images of size {tuple(x.shape[-2:])} in a model of img_size {self.img_size}")
        x = self.patch_embed(x) + self.pos_embed
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
