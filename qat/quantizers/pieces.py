"""Cuts work into pieces, as `qat.quantizers.blocks` does, also where every group has constants of its own.

A search has a group for each candidate and row of samples. Without pieces, the temporary tensors of a whole table of
candidates would leave the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qat.quantizers.blocks import OTHER_BLOCK

CPU_PIECE = 2**18  # values for each thread: temporary tensors of 1 MB stay in the cache


def pieces(tensors: Sequence[Tensor], constants: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike, and the constants of each piece, which are cut where they differ.

    Args:
        tensors: dense or not; a piece is a view.
        constants: a single value, or as many dimensions as the tensors, over which they broadcast.
    """
    first = tensors[0]
    size = CPU_PIECE * torch.get_num_threads() if first.device.type == "cpu" else OTHER_BLOCK
    if first.numel() <= size:
        yield (*tensors, *constants)
    elif all(x.numel() == 1 for x in constants) and all(x.is_contiguous() for x in tensors):
        for piece in zip(*(x.view(-1).split(size) for x in tensors), strict=True):
            yield (*piece, *(x.view(1) for x in constants))
    else:
        rows = size * len(first) // first.numel()
        for start in range(0, len(first), max(1, rows)):
            window = slice(start, start + rows) if rows else start  # of a single row, its own pieces
            own = [x.view(1) if x.numel() == 1 else x[window] if len(x) > 1 else x if rows else x[0] for x in constants]
            yield from pieces([x[window] for x in tensors], own)
