"""Codes as a stream of bits: the layout that is written down, and the way back."""

from __future__ import annotations

import pytest
import torch

from qat.checkpoint import bits
from qat.checkpoint.bits import pack, stream_size, unpack

# Worked out by hand, lowest bit first: 1 2 3 of 4 bits are 0010_0001 and 0000_0011.
EXAMPLES = [
    (4, [1, 2, 3], [0x21, 0x03]),
    (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    (8, [255, 0], [255, 0]),
    (6, [1, 2, 63, 4], [0b10_000001, 0b1111_0000, 0b000100_11]),
    (9, [0x101, 1], [0x01, 0b0000001_1, 0x00]),
]


@pytest.mark.parametrize(("width", "codes", "stream"), EXAMPLES)
def test_the_worked_examples(width, codes, stream):
    found = pack(torch.tensor(codes, dtype=torch.int32), width)
    assert found.dtype == torch.uint8
    assert found.tolist() == stream
    assert unpack(found, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", range(1, 20))
def test_every_width_and_every_remainder_comes_back(monkeypatch, width):
    monkeypatch.setattr(bits, "CHUNK", 16)
    for count in (0, 1, 7, 8, 9, 16, 17, 50):
        codes = torch.randint(0, 2**width, (count,), generator=torch.Generator().manual_seed(count))
        stream = pack(codes, width)
        assert len(stream) == stream_size(count, width) == -(-count * width // 8)
        assert torch.equal(unpack(stream, width, count), codes.int())


def test_rows_follow_each_other():
    codes = torch.arange(15).view(3, 5) % 4
    assert torch.equal(pack(codes, 2), pack(codes.flatten(), 2))
