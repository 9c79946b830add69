"""Moves scales between a LayerNorm and the layer that reads it, without changing what they compute together.

For y = gamma * x + beta, read by W y + b, and any ratio r > 0 and shift t per channel (RepQ-ViT, equations 5 to 8)::

    y~ = (y + t) / r:   gamma / r,   (beta + t) / r,   W * r (columns),   b - W t

Shapes: C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.quantizers import Quantizer
from qat.sites.family import NormLink, Unit
from qat.sites.insert import switched_off

TINY = 1e-30  # of a norm: a head that starts at zero gives zeros
TOLERANCE = 1e-4  # relative; the rewrite is exact but for rounding in float32


@torch.no_grad()
def fold(model: nn.Module, link: NormLink, ratio: Tensor, shift: Tensor) -> None:
    """Change the output y of a norm to (y + shift) / ratio, both (C,), and its readers to undo that; in float64."""
    assert link.readers
    norm: Any = model.get_submodule(link.norm)
    gamma, beta, ratio, shift = (x.double() for x in (norm.weight, norm.bias, ratio, shift))
    norm.weight.copy_(gamma / ratio)
    norm.bias.copy_((beta + shift) / ratio)
    linear: Any
    for linear in map(model.get_submodule, link.readers):
        weight, bias = linear.weight.double(), linear.bias.double()
        linear.weight.copy_(weight * ratio)
        linear.bias.copy_(bias - weight @ shift)


@contextmanager
def unit_unchanged(unit: Unit, x: Tensor, off: Iterable[Quantizer]) -> Iterator[None]:
    """Check that a part of the float model computes the same before and after the block.

    Raises:
        QatError: its output for ``x`` has changed by more than `TOLERANCE`, relative to its norm.
    """
    off = list(off)
    with switched_off(off):
        before = unit.run(x)
        if not bool(before.isfinite().all()):
            raise QatError(
                f"what {unit.name} of the float model computes is not finite: check its checkpoint and the images"
            )
        yield
        change = float((unit.run(x) - before).norm() / before.norm().clamp(min=TINY))
    if not change <= TOLERANCE:
        raise QatError(
            f"a rewrite changed the float model: what {unit.name} computes, by {change:.1e} of its norm, allowed are "
            f"{TOLERANCE:.0e}: something else reads a LayerNorm of this model (padded windows do), so choose a method "
            "that rewrites none"
        )
