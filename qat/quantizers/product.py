"""Matrix products of quantised operands that keep no quantised activation for backward.

A product needs its operands again in backward. A quantised one is a function of a tensor that its quantizer keeps
anyway, so it is computed again in place of being kept: 4 bytes less per value of an activation in float32, 2 under
autocast to bfloat16. Quantised weights are kept: their size does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.quantizers.base import Quantizer

Operand = tuple[nn.Module, Tensor]  # a site and the tensor that goes through it


class Recipe(NamedTuple):
    """How a quantised operand is made again: from its quantizer, which is deterministic, and its input."""

    quantizer: Quantizer
    source: Tensor
    version: int  # of the input: a change in place would change the operand
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


def product(op: Callable[..., Tensor], *operands: Operand) -> Tensor:
    """``op`` of the quantised operands."""
    quantised = [site(x) for site, x in operands]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*quantised)
    device = quantised[0].device.type
    if torch.is_autocast_enabled(device):  # as the product would; here the result can be told by its address
        low = torch.get_autocast_dtype(device)
        quantised = [x.to(low) if x.dtype == torch.float32 else x for x in quantised]
    sources = {
        out.data_ptr(): (site, x.detach(), out.dtype)
        for (site, x), out in zip(operands, quantised, strict=True)
        if isinstance(site, Quantizer) and site.enabled and site.layout.batched
    }

    def pack(tensor: Tensor) -> Tensor | Recipe:
        """A recipe for an operand, whole and in the order of its memory; anything else is kept."""
        site, x, dtype = sources.get(tensor.data_ptr(), (None, tensor, tensor.dtype))
        if site is None or tensor.numel() != x.numel() or tensor.dtype != dtype:
            return tensor
        return Recipe(site, x, x._version, dtype, tensor.size(), tensor.stride())

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return op(*quantised)


@torch.no_grad()
def _unpack(kept: Any) -> Tensor:
    if not isinstance(kept, Recipe):
        tensor: Tensor = kept
        return tensor
    if kept.source._version != kept.version:
        raise RuntimeError("the input of a quantizer was changed in place before backward")
    again: Tensor = kept.quantizer.forward(kept.source).to(kept.dtype)
    return again.as_strided(kept.size, kept.stride)
