"""Every quantizer of one number as a table of thresholds: the very value, on both sides of each of them."""

from __future__ import annotations

import pytest
import torch

from qat.errors import QatError
from qat.export.graph.ladder import LadderSite, Table, from_order, ladder, values_at
from qat.quantizers import IntegerNorm, LogSqrt2, TwinSoftmax
from qat.quantizers.layout import Layout
from tests.contracts.quantizer_cases import Case, over_cases

POSITIVE = {"LogSqrt2", "BitLog2", "TwinSoftmax"}


def test_the_order_of_floats():
    assert from_order(torch.tensor([0, 1, -1, 0x3F800000, -0x3F800000])).tolist() == [0, 2**-149, -(2**-149), 1, -1]


def calibrated(case: Case) -> torch.nn.Module:
    quantizer = case.build()
    x = torch.rand(case.shape, generator=torch.Generator().manual_seed(0))
    quantizer.init_from(quantizer.grouped(x if case.kind in POSITIVE else x - 0.3))
    return quantizer


@over_cases
def test_the_table_gives_the_values_of_the_quantizer(case: Case) -> None:
    if not case.layout.batched or dict(case.options) == {"bits": 2}:
        return
    quantizer = calibrated(case)
    if case.kind == "TwinSoftmax" and not case.spec.overlap and case.spec.width == 2:
        return  # its value falls, see below
    site = LadderSite("site", quantizer)
    thresholds, _ = ladder("site", quantizer)
    below = torch.nextafter(thresholds, torch.tensor(-torch.inf))
    some = torch.randn(len(thresholds), 500, generator=torch.Generator().manual_seed(1))
    x = torch.cat([thresholds, below, some, some * 1e-4], 1)
    places = torch.searchsorted(thresholds.contiguous(), x.contiguous(), right=True)
    values = site.values.gather(1, places)
    assert torch.equal(values, values_at(quantizer, x))
    tensor = torch.rand(case.shape, generator=torch.Generator().manual_seed(2)) - 0.3
    assert torch.equal(Table("site", quantizer)(tensor), quantizer(tensor).float())


def test_the_worked_example_of_a_logarithm():
    quantizer = LogSqrt2(bits=2).build(Layout(0, 1, batched=True))
    quantizer.set_range_(torch.zeros(1), torch.ones(1))
    thresholds, values = ladder("site", quantizer)
    assert values[0].tolist() == pytest.approx([0, 0.5, 2**-0.5, 1])
    assert thresholds[0].tolist() == pytest.approx([2**-1.25, 2**-0.75, 2**-0.25])  # half way between exponents


def test_what_has_no_such_table_is_refused_by_its_name():
    twin = TwinSoftmax(bits=2).build(Layout(0, 1, batched=True))
    twin.init_from(torch.rand(1, 100, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(QatError, match=r"site 'a.probs_quant' has TwinSoftmax.*falls somewhere"):
        ladder("a.probs_quant", twin)
    norm = IntegerNorm(bits=8, signed=False).build(Layout(0, 1, batched=True))
    with pytest.raises(QatError, match=r"site 'norm.output_quant' has IntegerNorm.*no ONNX form"):
        ladder("norm.output_quant", norm)
