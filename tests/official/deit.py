"""VVTQ's DeiT-T, written by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.official import layouts
from tests.official.layouts import CLASSES, Official, Shapes, Table, block, filled, float32, with_biases

TINY = "deit_tiny_patch16_224"
DEPTH = 12
OTHERS = ("patch_embed.quant", "quant")
LOGITS = {  # 0 to 4 of the first image
    "float": (-2.04080659, 1.16875444, -0.02748084, -0.03828243, -1.27750301),
    "w4a4": (-2.56814819, -0.21115564, -0.81082717, -1.18521714, -0.29885558),
    "w4a4, offset -0.17": (-1.44770046, -0.76193753, -0.71483376, -1.22141137, -0.80557491),
}


def shapes(C: int = 192) -> Shapes:
    """Names and shapes of VVTQ's float DeiT."""
    out: Shapes = {"cls_token": (1, 1, C), "pos_embed": (1, 197, C)}
    for i in range(DEPTH):
        out |= block(f"blocks.{i}", C, 4 * C)
    return out | with_biases({"patch_embed.proj": (C, 3, 16, 16), "norm": (C,), "head": (CLASSES, C)})


@cache
def fill() -> Table:
    """Float weights in the layout of VVTQ, float64."""
    return filled(shapes())


def quantized(w_bits: int = 4, a_bits: int = 4, switch: bool = False) -> Table:
    return layouts.quantized(fill(), OTHERS, w_bits, a_bits, switch)


class DeiT(Official):
    """The forward pass of VVTQ's DeiT-T."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = self.conv("patch_embed.proj", self.quant("patch_embed.quant", images), stride=16)
        token = self.table["cls_token"].expand(len(x), -1, -1)
        x = torch.cat([token, x.flatten(2).mT], 1) + self.table["pos_embed"]
        for i in range(DEPTH):
            x = x + self.attention(f"blocks.{i}.attn", self.norm(f"blocks.{i}.norm1", x), 64)
            x = x + self.mlp(f"blocks.{i}.mlp", self.norm(f"blocks.{i}.norm2", x))
        return self.head(self.norm("norm", x)[:, 0])


class OfficialFiles(NamedTuple):
    """Checkpoints as VVTQ's training writes them, and the table in the quantized one, W4A3."""

    float: Path
    quantized: Path
    table: Table


def write_files(folder: Path) -> OfficialFiles:
    """Write both files to ``folder``."""
    table = float32(quantized(4, 3))
    for name in [name for name in table if name.endswith("init_state")]:
        table[name].fill_(1)
    files = OfficialFiles(folder / "deit_tiny.pth", folder / "model_best.pth.tar", table)
    torch.save({"model": float32(fill())}, files.float)
    rest = {"epoch": 150, "arch": "resnet50", "best_acc1": torch.tensor(74.7), "optimizer": {"state": {}}}
    torch.save({"state_dict": {f"module.{name}": value for name, value in table.items()}, **rest}, files.quantized)
    return files
