"""Codes of a few bits as bytes, and back.

The codes follow each other, from the first row of a tensor to its last, without gaps: code i, of b bits, has the bits
i * b to i * b + b - 1 of the stream, its lowest bit first, and bit j of the stream is bit j % 8 of byte j // 8, where
bit 0 is the lowest. Two codes of 4 bits share a byte, the first one in its lower half; four codes of 2 bits share one,
and eight codes of 3 bits share three. Zeros fill the last byte up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**20  # codes at a time, a multiple of 8, so that every chunk ends with a byte
BYTE = 8


def stream_size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes."""
    return -(-count * bits // BYTE)


def container(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest type that holds codes of so many bits, the lowest byte first."""
    return np.dtype("u1" if bits <= BYTE else "<u2" if bits <= 2 * BYTE else "<u4")


def pack(codes: Tensor, bits: int) -> Tensor:
    """The stream, uint8, of codes from 0 to 2**bits - 1.

    Args:
        codes: integers in any shape.
        bits: of a code, 1 to 32.
    """
    kind = container(bits)
    flat = codes.detach().cpu().flatten().numpy()
    parts = [np.empty(0, np.uint8)]
    for first in range(0, len(flat), CHUNK):
        rows = flat[first : first + CHUNK].astype(kind)[:, None].view(np.uint8)  # (n, bytes of a code)
        parts.append(np.packbits(np.unpackbits(rows, axis=1, count=bits, bitorder="little"), bitorder="little"))
    return torch.from_numpy(np.concatenate(parts))


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes (count,) of a stream that `pack` made, int32."""
    kind = container(bits)
    found, data = np.empty(count, np.int32), stream.cpu().numpy()
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        part = data[first * bits // BYTE : stream_size(last, bits)]
        rows = np.unpackbits(part, count=(last - first) * bits, bitorder="little").reshape(-1, bits)
        whole = np.zeros((last - first, BYTE * kind.itemsize), np.uint8)
        whole[:, :bits] = rows
        found[first:last] = np.packbits(whole, axis=1, bitorder="little").view(kind)[:, 0]
    return torch.from_numpy(found)
