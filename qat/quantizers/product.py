"""Matrix products of quantised operands that keep no quantised operand for backward.

A product needs its operands again in backward. A quantised one is a function of a tensor that its quantizer keeps
anyway, so it is computed again in place of being kept: 4 bytes less per value of an activation. Quantised weights are
kept: they are few, and there are many of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.base import Quantizer

Operand = tuple[nn.Module, Tensor]  # a site and the tensor that goes through it


def product(op: Callable[..., Tensor], *operands: Operand) -> Tensor:
    """``op`` of the quantised operands."""
    quantised = [site(x) for site, x in operands]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*quantised)
    sources = {
        out.data_ptr(): (site, x.detach())
        for (site, x), out in zip(operands, quantised, strict=True)
        if isinstance(site, Quantizer) and site.layout.batched and out is not x
    }

    def pack(tensor: Tensor) -> Any:
        """A recipe for an operand, whole and in the order of its memory; anything else is kept."""
        source = sources.get(tensor.data_ptr())
        if source is None or tensor.numel() != source[1].numel() or tensor.dtype != source[1].dtype:
            return tensor
        return (*source, tensor.size(), tensor.stride())

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return op(*quantised)


@torch.no_grad()
def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    site, x, size, stride = kept
    again: Tensor = site(x)
    return again.as_strided(size, stride)
