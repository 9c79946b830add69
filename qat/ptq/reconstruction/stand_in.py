"""Modules that take the place of sites while a unit is reconstructed.

Shapes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.quantizers import Quantizer


@contextmanager
def standing_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the place of sites, by name, inside the block."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in modules]
    before = [getattr(parent, child) for parent, child, _ in places]
    try:
        for parent, child, name in places:
            setattr(parent, child, modules[name])
        yield
    finally:
        for (parent, child, _), module in zip(places, before, strict=True):
            setattr(parent, child, module)


class Dropped(nn.Module):
    """An activation's quantizer that lets values pass at random in training (QDrop, ICLR 2022, arXiv 2203.05740).

    It is no `Quantizer`, so that products keep what it gave and do not compute it again in backward.

    Args:
        quantizer: always used in evaluation mode.
        keep: probability with which a value is quantized.
        generator: draws, on the device of the values.
    """

    def __init__(self, quantizer: Quantizer, keep: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.keep, self.generator = quantizer, keep, generator

    def forward(self, x: Tensor) -> Tensor:
        """Values, each quantized or not."""
        quantized: Tensor = self.quantizer(x)
        if not self.training or not self.quantizer.enabled:
            return quantized
        return mixed(quantized, x, self.keep, self.generator)


def mixed(quantized: Tensor, x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Elements of the first tensor with a probability of ``keep``, to the nearest of 2**-16, else of the second.

    The result is written over the first tensor, which must be nobody else's.
    """
    return cast(Tensor, Mixture.apply(quantized, x, chosen(x.detach(), keep, generator)))


def chosen(x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Zeros and ones like ``x``.

    One random bit for each value, or 8 or 16 where ``keep`` needs them, take a tenth of the time of a random float.
    """
    if keep == 0.5:
        return coins(x, generator)
    width, kind = (8, torch.int8) if (keep * 2**8).is_integer() else (16, torch.int16)
    count = x.numel() // (64 // width) + 1
    words = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=x.device)
    bits, most = words.view(kind)[: x.numel()].view(x.shape), round(keep * 2**width) - 2 ** (width - 1) - 1
    return torch.le(bits, most, out=torch.empty_like(x, memory_format=torch.contiguous_format))


def coins(x: Tensor, generator: torch.Generator) -> Tensor:
    """Zeros and ones like ``x``, each with the probability 1/2: the bits of random bytes, from the lowest on."""
    count = x.numel() // 8 + 1
    words = torch.randint(-(2**63), 2**63 - 1, (count // 8 + 1,), generator=generator, device=x.device)
    some, found = words.view(torch.uint8)[:count], torch.empty(8, count, dtype=x.dtype, device=x.device)
    for bit, row in enumerate(found):
        torch.gt(some & (1 << bit), 0, out=row)
    return found.view(-1)[: x.numel()].view(x.shape)


class Mixture(torch.autograd.Function):
    """Elements of one tensor or another: `torch.where` takes five times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, x: Tensor, picked: Tensor) -> Tensor:
        """Those of ``quantized`` where ``picked`` is 1; an interpolation ends exactly at either of the two."""
        ctx.save_for_backward(picked)
        ctx.mark_dirty(quantized)
        return torch.lerp(x, quantized, picked, out=quantized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient goes where the element came from."""
        (picked,) = ctx.saved_tensors
        first = grads[0] * picked
        return first, grads[0] - first, None
