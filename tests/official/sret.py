"""SReT-T as published and in VVTQ, written by hand, without its permutation of the tokens."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.official import layouts
from tests.official.layouts import CLASSES, Official, Shapes, Table, block, filled, with_biases

SRET_T = "sret_tiny"
STAGES = ((64, 230, 8), (128, 460, 20), (256, 921, 12))  # width, hidden width, entries of the list of modules
GROUPS = ((8, 2), (4, 1), (1, 1))
OTHERS = (*(f"patch_embed.quant{i}" for i in (1, 2, 3)), "pools.0.quant", "pools.1.quant", "quant")
LOGITS = {  # 0 to 4 of the first image
    "float": (-2.01641888, 0.57544778, -0.15935934, -0.11592360, 0.54656476),
    "float, portable": (-2.01273472, 0.56707651, -0.16028278, -0.11721466, 0.54861801),
    "w4a4": (-0.82988415, 0.04754187, 0.02918432, -0.55538283, 0.66696249),
    "w4a4, offset -0.17": (-0.98217006, -0.45315574, -0.00427243, -0.47001043, 0.57236063),
}


def shapes() -> Shapes:
    """Names and shapes of VVTQ's float SReT-T; a block that is applied twice has only its first name."""
    out: Shapes = {"pos_embed": (1, 64, 28, 28)}
    for s, (C, hidden, entries) in enumerate(STAGES):
        for i in range(entries):
            at = f"transformers.{s}.blocks.{i}"
            if i % 4 == 0:
                out |= block(at, C, hidden)
            elif i % 2:
                out |= with_biases({f"{at}.norm1": (C,), f"{at}.mlp.fc1": (C, C), f"{at}.mlp.fc2": (C, C)})
            if i % 4 != 2:
                out |= {f"{at}.coefficient{k}.bias": (1,) for k in ((1, 2) if i % 2 else (1, 2, 3, 4))}
    layers: Shapes = {"norm": (256,), "head": (CLASSES, 256)}
    layers |= {f"pools.{p}.conv": (2 * STAGES[p][0], 1, 3, 3) for p in (0, 1)}
    for i, (wide, C) in enumerate(((3, 32), (32, 64), (64, 64)), 1):
        layers |= {f"patch_embed.conv{i}": (C, wide, 3, 3), f"patch_embed.bn{i}": (C,)}
        out |= {f"patch_embed.bn{i}.running_{x}": (C,) for x in ("mean", "var")}
    return out | with_biases(layers)


def with_second_names(table: Table) -> Table:
    """Entries 2, 6, 10, ... of a list are the modules of entries 0, 4, 8, ..."""
    out = dict(table)
    for name, value in table.items():
        if name.startswith("transformers.") and int(name.split(".")[3]) % 4 == 0:
            s, i, rest = name.removeprefix("transformers.").replace("blocks.", "", 1).split(".", 2)
            out[f"transformers.{s}.blocks.{int(i) + 2}.{rest}"] = value
    return out


@cache
def distinct() -> Table:
    """Float weights in the layout of VVTQ, float64, each under one name."""
    batches = {f"patch_embed.bn{i}.num_batches_tracked": torch.tensor(1000 + i) for i in (1, 2, 3)}
    return filled(shapes()) | batches


def fill() -> Table:
    """All tensors of a float file in the layout of VVTQ, float64."""
    return with_second_names(distinct())


def quantized(w_bits: int = 4, a_bits: int = 4, switch: bool = False) -> Table:
    return with_second_names(layouts.quantized(distinct(), OTHERS, w_bits, a_bits, switch))


class SReT(Official):
    """The forward pass of VVTQ's SReT-T."""

    def scaled(self, at: str, x: Tensor, branch: Tensor, first: int) -> Tensor:
        scale = [self.table[f"{at}.coefficient{first + i}.bias"] for i in (0, 1)]
        return scale[0] * x + scale[1] * branch

    def block(self, at: str, x: Tensor, groups: int) -> Tensor:
        cut = self.norm(f"{at}.norm1", x).unflatten(1, (groups, -1)).flatten(0, 1)
        x = self.scaled(at, x, self.attention(f"{at}.attn", cut, 32).view_as(x), 1)
        return self.scaled(at, x, self.mlp(f"{at}.mlp", self.norm(f"{at}.norm2", x)), 3)

    def stage(self, s: int, x: Tensor) -> Tensor:
        x, side = x.flatten(2).mT, x.shape[-1]
        for i in range(STAGES[s][2]):
            at = f"transformers.{s}.blocks.{i}"
            if i % 2:
                x = self.scaled(at, x, self.mlp(f"{at}.mlp", self.norm(f"{at}.norm1", x)), 1)
            else:
                x = self.block(at, x, GROUPS[s][i % 4 == 2])
        return x.mT.unflatten(2, (side, side))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images
        for i in (1, 2, 3):
            x = self.conv(f"patch_embed.conv{i}", self.quant(f"patch_embed.quant{i}", x), stride=2, padding=1)
            keys = ("running_mean", "running_var", "weight", "bias")
            x = F.batch_norm(x, *(self.table[f"patch_embed.bn{i}.{key}"] for key in keys)).relu()
        x = self.stage(0, x + self.table["pos_embed"])
        for p in (0, 1):
            pooled = self.quant(f"pools.{p}.quant", x)
            x = self.stage(p + 1, self.conv(f"pools.{p}.conv", pooled, stride=2, padding=1, groups=x.shape[1]))
        return self.head(self.norm("norm", x.mean((2, 3))))
