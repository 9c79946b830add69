"""How tensors are cut, and that every quantizer computes the same in blocks as at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.quantizers import LSQ, PTF, BitLog2, LogSqrt2, Spec, Uniform, blocks
from qat.quantizers.blocks import row_blocks
from qat.quantizers.layout import Layout

SIZE = 24  # values in a block


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "block_size", lambda device: SIZE)


def shapes(*tensors: Tensor, constants: tuple[object, ...] = ()) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part, *_ in blocks.blocks(tensors, constants)]


def test_dense_tensors_are_cut_anywhere(small: None) -> None:
    assert shapes(torch.zeros(5, 10), torch.zeros(5, 10), constants=(torch.ones(1), None, 3)) == [(24,), (24,), (2,)]


def test_what_is_not_dense_is_cut_along_the_first_axis(small: None) -> None:
    x = torch.zeros(10, 5).mT  # (5, 10)
    assert shapes(x, constants=(torch.ones(1),)) == [(2, 10), (2, 10), (1, 10)]
    assert shapes(torch.zeros(5, 10), constants=(torch.ones(10),)) == [(2, 10), (2, 10), (1, 10)]
    assert shapes(torch.zeros(5, 3, 10), constants=(torch.ones(1, 3, 1),)) == [(1, 3, 10)] * 5


def test_what_a_constant_ties_together_is_not_cut(small: None) -> None:
    assert shapes(torch.zeros(5, 10), constants=(torch.ones(5, 1),)) == [(5, 10)]


def test_small_and_empty_tensors_are_not_cut(small: None) -> None:
    assert shapes(torch.zeros(2, 3, 4)) == [(2, 3, 4)]
    assert shapes(torch.zeros(47)) == [(47,)]  # less than two blocks
    assert shapes(torch.zeros(48)) == [(24,), (24,)]
    assert shapes(torch.zeros(0, 3)) == [(0, 3)]


def test_rows_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "block_size", lambda device: 4 * SIZE)
    x, y = torch.arange(50.0).view(1, 5, 10), torch.zeros(1, 5, 10, dtype=torch.uint8)
    parts = list(row_blocks(x, y))
    assert [tuple(part.shape) for part, _ in parts] == [(2, 10), (2, 10), (1, 10)]
    for part, target in parts:
        target.copy_(part)
    assert torch.equal(y, x.byte())  # a block is a view
    assert [tuple(part.shape) for (part,) in row_blocks(torch.zeros(100))] == [(1, 100)]
    assert [tuple(part.shape) for (part,) in row_blocks(torch.zeros(0, 7))] == [(0, 7)]


SPECS: list[Spec] = [
    LSQ(4), LSQ(4, offset=True), LSQ(3, granularity="head"), LSQ(4, offset=True, granularity="channel"), Uniform(4),
    Uniform(8, granularity="channel"), PTF(8), LogSqrt2(4), LogSqrt2(8, granularity="head"), BitLog2(4),
    BitLog2(3, granularity="channel"),
]  # fmt: skip
CUTS = {"tensor": (0, 1), "head": (1, 2), "channel": (-1, 6)}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_quantizer_computes_the_same_in_blocks(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and every gradient, bit for bit, of dense and of permuted tensors, in all precisions."""
    axis, groups = CUTS[spec.granularity]
    quantizer = spec.build(Layout(axis, groups, batched=True))
    x = torch.rand(5, 2, 7, 6, generator=torch.Generator().manual_seed(0)) * 2 - (0.5 if spec.signed else 0)
    quantizer.init_from(quantizer.grouped(x))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for given in (x.to(dtype), x.to(dtype).transpose(0, 3).contiguous().transpose(0, 3)):
            found = []
            for size in (2**17, SIZE, 150):
                monkeypatch.setattr(blocks, "block_size", lambda device, size=size: size)
                leaf = given.detach().requires_grad_()
                quantizer.zero_grad()
                out = quantizer(leaf)
                out.backward(upstream.to(dtype))
                found.append([out.detach(), leaf.grad, *(p.grad for p in quantizer.parameters())])
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
