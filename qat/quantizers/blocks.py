"""Cuts work into blocks, so that what lies between input and output is small, stays in the cache and is reused.

A temporary of the size of an activation costs more than the arithmetic on it: its pages come fresh from the system.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CPU_BLOCK = 2**19  # values for each thread
OTHER_BLOCK = 2**24  # accelerators: enough work for one kernel, and 128 MB of float64


def block_size(device: torch.device) -> int:
    """How many values to compute at once."""
    return CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else OTHER_BLOCK


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Dense tensors of one shape (..., N), cut alike into blocks (rows, N) of whole rows.

    They are a quarter of `block_size`: rows are for arithmetic in float64, which has many operands at a time.
    """
    rows = [x.flatten(0, -2) if x.ndim > 1 else x[None] for x in tensors]
    count, width = rows[0].shape
    size = count if torch.compiler.is_compiling() else block_size(rows[0].device) // 4 // max(1, width)
    return zip(*(x.split(max(1, size)) for x in rows), strict=True)


def blocks(tensors: Sequence[Tensor], constants: Sequence[object]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike; all of them at once where that is not possible.

    Args:
        tensors: dense or not; a block is a view.
        constants: what each block is combined with. It must broadcast over every block, so tensors with more than one
            value along the first axis of ``tensors`` prevent the cut.
    """
    shape, size = tensors[0].shape, block_size(tensors[0].device)
    if torch.compiler.is_compiling() or tensors[0].numel() < 2 * size:
        return iter([tuple(tensors)])
    shapes = [tuple(constant.shape) for constant in constants if isinstance(constant, Tensor)]
    if set(shapes) <= {(), (1,)} and all(x.is_contiguous() for x in tensors):
        return zip(*(x.view(-1).split(size) for x in tensors), strict=True)
    if all(len(found) < len(shape) or found[0] == 1 for found in shapes):
        rows = max(1, size * shape[0] // tensors[0].numel())
        return zip(*(x.split(rows) for x in tensors), strict=True)
    return iter([tuple(tensors)])
