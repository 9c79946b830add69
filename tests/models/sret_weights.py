"""What the tests of SReT share: tiny models, and weights by a formula in terms of the official names."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qat.models import build_float
from qat.models.sret_float import SReT
from tests.formula import filled

TINY = {"img_size": 32, "embed_dims": (12, 24), "depths": (1, 2), "num_heads": (2, 4), "groups": ((4, 2), (2, 1))}
SPLIT = ("proj_q", "proj_k", "proj_v")  # the official layout has three projections


def tiny(**arguments) -> SReT:
    torch.manual_seed(0)
    return build_float("sret_tiny", None, 10, {**TINY, **arguments}).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def official_names(name: str) -> list[str]:
    """Where the official layout has one of our tensors: block j is entry 4 j of its stage's list, MLP i is 2 i + 1."""
    parts = name.split(".")
    for kind, stride, first in (("blocks", 4, 0), ("mlps", 2, 1)):
        if kind in parts:
            i = parts.index(kind)
            parts[i : i + 2] = ["blocks", str(stride * int(parts[i + 1]) + first)]
    if parts[0] == "stages":
        parts[0] = "transformers"
    if parts[-1].startswith("coefficient"):
        parts.append("bias")
    joined = ".".join(parts)
    return [joined.replace("qkv", part) for part in SPLIT] if ".qkv." in joined else [joined]


def fill(model: nn.Module) -> dict[str, int]:
    """Formula weights in float64; returns the ranks of the official names."""
    state = {name: value for name, value in model.double().state_dict().items() if "num_batches" not in name}
    ranks = {name: i for i, name in enumerate(sorted(part for name in state for part in official_names(name)))}
    for name, value in state.items():
        parts = value.chunk(len(official_names(name)))
        for part, official in zip(parts, official_names(name), strict=True):
            part.copy_(filled(official, tuple(part.shape), ranks[official]))
    return ranks


def double(values: Iterable[float]) -> Tensor:
    return torch.tensor([*values], dtype=torch.float64)
