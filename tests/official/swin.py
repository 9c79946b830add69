"""Swin-T as published and in VVTQ, written by hand. Shapes: h x w tokens, C channels, W windows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests.official import layouts
from tests.official.layouts import CLASSES, Official, Shapes, Table, block, filled, with_biases

SWIN_T = "swin_tiny_patch4_window7_224"
DEPTHS, WIDTHS, SIDES = (2, 2, 6, 2), (96, 192, 384, 768), (56, 28, 14, 7)
OTHERS = ("patch_embed.quant", "quant")
LOGITS = {  # 0 to 4 of the first image
    "float": (-0.02820995, -1.28602746, 2.07702200, 1.76495591, 0.07909801),
    "w4a4": (0.43234089, -0.82260781, 2.56426674, 1.83829616, 0.29346963),
    "w4a4, offset -0.17": (0.74332526, -0.40388685, 2.39158255, 1.81231712, 0.53797822),
}


def shapes() -> Shapes:
    """Names and shapes of VVTQ's float Swin-T, without the tensors that timm computes."""
    out: Shapes = {}
    for s, (depth, C) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        for i in range(depth):
            out |= block(f"layers.{s}.blocks.{i}", C, 4 * C)
            out[f"layers.{s}.blocks.{i}.attn.relative_position_bias_table"] = (13 * 13, C // 32)
    for s, C in enumerate(WIDTHS[:3]):
        out |= with_biases({f"layers.{s}.downsample.norm": (4 * C,)})
        out[f"layers.{s}.downsample.reduction.weight"] = (2 * C, 4 * C)
    outer: Shapes = {"patch_embed.proj": (96, 3, 4, 4), "patch_embed.norm": (96,)}
    return out | with_biases({**outer, "norm": (768,), "head": (CLASSES, 768)})


def index() -> Tensor:
    """The entry in the table of biases for each pair of tokens in a window (49, 49)."""
    y, x = torch.arange(49) // 7, torch.arange(49) % 7
    return 13 * (y[:, None] - y[None] + 6) + x[:, None] - x[None] + 6


def windows(x: Tensor) -> Tensor:
    """(B, h, w, C) to (B * W, 49, C)."""
    B, h, w, C = x.shape
    return x.view(B, h // 7, 7, w // 7, 7, C).transpose(2, 3).reshape(-1, 49, C)


def mask(side: int) -> Tensor:
    """(W, 49, 49): -100 between tokens that the shift by 3 brought together from opposite edges."""
    along = torch.arange(side)
    part = (along >= side - 7).int() + (along >= side - 3).int()
    part = windows((3 * part[:, None] + part[None]).view(1, side, side, 1)).squeeze(2)
    return torch.where(part[:, :, None] == part[:, None], 0.0, -100.0)


@cache
def fill() -> Table:
    """All tensors of a float file in the layout of VVTQ, float64."""
    table = filled(shapes())
    for s, depth in enumerate(DEPTHS):
        for i in range(depth):
            table[f"layers.{s}.blocks.{i}.attn.relative_position_index"] = index()
            if i % 2 and s < 3:
                table[f"layers.{s}.blocks.{i}.attn_mask"] = mask(SIDES[s])
    return table


def quantized(w_bits: int = 4, a_bits: int = 4, switch: bool = False) -> Table:
    table = layouts.quantized(fill(), OTHERS, w_bits, a_bits, switch)
    table["patch_embed.quant.alpha"].zero_()  # never called
    return table


class Swin(Official):
    """The forward pass of VVTQ's Swin-T."""

    eps = 1e-5

    def block(self, at: str, x: Tensor) -> Tensor:
        shift = 3 if f"{at}.attn_mask" in self.table else 0
        B, h, w, C = x.shape
        cut = windows(self.norm(f"{at}.norm1", x).roll((-shift, -shift), (1, 2)))
        bias = self.table[f"{at}.attn.relative_position_bias_table"][index()].permute(2, 0, 1)  # (H, 49, 49)
        if shift:
            bias = (bias + self.table[f"{at}.attn_mask"].unsqueeze(1)).repeat(B, 1, 1, 1)
        cut = self.attention(f"{at}.attn", cut, 32, bias).view(B, h // 7, w // 7, 7, 7, C)
        x = x + cut.transpose(2, 3).reshape(B, h, w, C).roll((shift, shift), (1, 2))
        return x + self.mlp(f"{at}.mlp", self.norm(f"{at}.norm2", x))

    def merge(self, at: str, x: Tensor) -> Tensor:
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.linear(f"{at}.reduction", self.norm(f"{at}.norm", x))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = self.norm("patch_embed.norm", self.conv("patch_embed.proj", images, stride=4).permute(0, 2, 3, 1))
        for s, depth in enumerate(DEPTHS):
            for i in range(depth):
                x = self.block(f"layers.{s}.blocks.{i}", x)
            if s < 3:
                x = self.merge(f"layers.{s}.downsample", x)
        return self.head(self.norm("norm", x).mean((1, 2)))
