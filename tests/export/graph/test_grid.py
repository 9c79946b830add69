"""Integers and their containers."""

from __future__ import annotations

import pytest
import torch

from qat.export.graph.grid import container_of, grid_of
from qat.export.graph.sites import WeightCodes
from qat.quantizers import LSQ, LogSqrt2, Uniform
from qat.quantizers.layout import Layout

CONTAINERS = [  # smallest and largest n, type, zero point
    ((0, 255), torch.uint8, 0),
    ((0, 15), torch.uint8, 0),
    ((-8, 7), torch.uint8, 128),
    ((-128, 127), torch.uint8, 128),
    ((-3, 252), torch.uint8, 3),
    ((-200, 55), torch.uint8, 200),
    ((3, 258), torch.uint16, 0),  # a range without zero: the zero point would be -3
    ((-512, 511), torch.uint16, 32768),
]


@pytest.mark.parametrize(("ends", "kind", "zero"), CONTAINERS)
def test_the_smallest_container_that_has_a_zero_point(ends, kind, zero):
    found = container_of(*ends)
    assert (found.kind, found.zero) == (kind, zero)
    assert found.ends[0] <= ends[0] <= ends[1] <= found.ends[1]


def test_a_range_far_from_zero_has_none():
    assert container_of(70_000, 70_255) is None


@pytest.mark.parametrize(
    "spec", [LSQ(bits=3), LSQ(bits=4, signed=False, offset=True), Uniform(bits=4), Uniform(bits=8)]
)
def test_integers_times_scale_plus_offset_are_the_values(spec):
    quantizer = spec.build(Layout(1, 2, batched=True))
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    quantizer.init_from(quantizer.grouped(x))
    grid = grid_of(quantizer)
    values = grid.integers(x) * grid.layout.view(grid.scale, x)
    if grid.offset is not None:
        values = values + grid.layout.view(grid.offset, x)
    assert torch.equal(values, quantizer(x).detach())


def test_a_logarithm_is_on_no_grid():
    assert grid_of(LogSqrt2(bits=4).build(Layout(0, 1, batched=True))) is None


@pytest.mark.parametrize(("spec", "ends"), [(LSQ(bits=4), (-8, 7)), (Uniform(bits=4), (-8, 7)), (LSQ(bits=2), (-2, 1))])
def test_codes_of_weights_are_signed_integers_of_their_width(spec, ends):
    quantizer = spec.build(Layout(0, 6, batched=False))
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) + 1
    quantizer.init_from(quantizer.grouped(weight))
    found = WeightCodes(weight, grid_of(quantizer), flip=True)
    assert found.codes.shape == (10, 6)
    assert (int(found.codes.min()), int(found.codes.max())) == ends or isinstance(spec, LSQ)
    assert found.codes.min() >= ends[0]
    assert found.codes.max() <= ends[1]
    values = (found.codes.float() - found.zero.float()) * found.scale
    assert torch.equal(values.mT, quantizer(weight).detach())


def test_a_weight_of_many_bits_keeps_its_offset():
    quantizer = LSQ(bits=12, offset=True).build(Layout(0, 6, batched=False))
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) + 1
    quantizer.init_from(quantizer.grouped(weight))
    found = WeightCodes(weight, grid_of(quantizer), flip=True)
    torch.testing.assert_close(found.values.mT, quantizer(weight).detach())
