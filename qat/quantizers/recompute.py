"""Matrix products of quantized operands that keep no quantized activation for backward.

A product needs its operands again in backward. A quantized one is a function of a tensor that its quantizer keeps
anyway, so it is computed again in place of being kept: 4 bytes less per value of an activation in float32, 2 under
autocast to bfloat16. Quantized weights are kept: their size does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.quantizers.quantizer import Quantizer

SiteInput = tuple[nn.Module, Tensor]  # a site and the tensor that goes through it
_keeps = ContextVar("keeps", default=False)  # whether operands are kept after all


class Recomputed(NamedTuple):
    """What an operand is computed from again in backward: its quantizer, which is deterministic, and its input."""

    quantizer: Quantizer
    source: Tensor
    version: int  # of the input: a change in place would change the operand
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


@contextmanager
def operands_kept() -> Iterator[None]:
    """Keep all operands inside the block: for a graph of a single unit, where time is short and memory is not."""
    token = _keeps.set(True)
    try:
        yield
    finally:
        _keeps.reset(token)


def keeps_operands() -> bool:
    """Whether the caller is inside of such a block."""
    return _keeps.get()


def recompute_operands(op: Callable[..., Tensor], *operands: SiteInput) -> Tensor:
    """``op`` of the quantized operands, none of which is kept for backward if it can be computed again."""
    quantized = [site(x) for site, x in operands]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or keeps_operands():
        return op(*quantized)
    device = quantized[0].device.type
    if torch.is_autocast_enabled(device):  # the product would cast too, but here the result is known by its address
        low = torch.get_autocast_dtype(device)
        quantized = [x.to(low) if x.dtype == torch.float32 else x for x in quantized]
    sources = {
        out.data_ptr(): (site, x.detach(), out.dtype)
        for (site, x), out in zip(operands, quantized, strict=True)
        if isinstance(site, Quantizer) and site.enabled and site.deterministic and site.layout.batched
    }

    def pack(tensor: Tensor) -> Tensor | Recomputed:
        """Replace an operand, whole and in the order of its memory; anything else is kept."""
        site, x, dtype = sources.get(tensor.data_ptr(), (None, tensor, tensor.dtype))
        if site is None or tensor.numel() != x.numel() or tensor.dtype != dtype:
            return tensor
        return Recomputed(site, x, x._version, dtype, tensor.size(), tensor.stride())

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return op(*quantized)


@torch.no_grad()
def _unpack(kept: Any) -> Tensor:
    if not isinstance(kept, Recomputed):
        tensor: Tensor = kept
        return tensor
    if kept.source._version != kept.version:
        raise RuntimeError("the input of a quantizer was changed in place before backward")
    again: Tensor = kept.quantizer.forward(kept.source).to(kept.dtype)
    return again.as_strided(kept.size, kept.stride)
