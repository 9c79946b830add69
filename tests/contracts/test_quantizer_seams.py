"""What calibration and the integer LayerNorm ask of quantizers: affine codes, whole steps, tables of candidates.

A test runs over all cases of an example, and a failure names the case. Shapes: G groups that share a step, n values in
a group, K candidates.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qat.quantizers import Quantizer
from qat.quantizers.layout import Layout
from qat.quantizers.spec import Spec
from tests.contracts.quantizer_cases import all_codes, calibrated, over_cases, samples


@over_cases
def test_affine_is_what_encode_and_decode_compute(case):
    quantizer = calibrated(case)
    affine = quantizer.affine()
    if affine is None:
        return
    x, codes = samples(case) * 1.5, all_codes(case, quantizer)
    assert (affine.axis is None) == (affine.scale.numel() == 1)
    assert torch.equal(affine.zero_point, affine.zero_point.round())
    assert (affine.qmin, affine.qmax) == (quantizer.spec.qmin, quantizer.spec.qmin + quantizer.spec.levels - 1)
    scale, zero = (along(values, affine.axis, x) for values in affine[:2])
    expected = ((x / scale).round() + zero).clamp(affine.qmin, affine.qmax)
    assert torch.equal(quantizer.encode(x).float(), expected)
    scale, zero = (along(values, affine.axis, codes) for values in affine[:2])
    assert torch.equal(quantizer.decode(codes), (codes.float() - zero) * scale)


def along(values: Tensor, axis: int | None, x: Tensor) -> Tensor:
    """One value per group (G,), repeated for the G equal pieces of an axis of ``x``."""
    if axis is None:
        return values
    pieces = torch.stack([values] * (x.shape[axis] // len(values)), 1).flatten()
    return pieces.view([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def test_the_affine_form_of_a_worked_example():
    """Two heads of unsigned 4-bit codes: steps 0.5 and 0.25, zero points 2 and 8."""
    quantizer = Spec.kinds["Uniform"](4, granularity="head").build(Layout(1, 2, batched=True))
    quantizer.set_range_(torch.tensor([-1.0, -2.0]), torch.tensor([6.5, 1.75]))
    scale, zero, axis, qmin, qmax = quantizer.affine()
    assert (scale.tolist(), zero.tolist(), axis, qmin, qmax) == ([0.5, 0.25], [2, 8], 1, 0, 15)
    x = torch.tensor([[[0.7, -9.0], [0.7, 9.0]]])  # (1, 2 heads, 2)
    assert quantizer.encode(x).tolist() == [[[3, 0], [11, 15]]]  # 1.4 and 2.8 are rounded, then 2 and 8 are added
    assert quantizer(x).tolist() == [[[0.5, -1.0], [0.75, 1.75]]]


@over_cases
def test_whole_steps_give_the_integers_back(case):
    quantizer = calibrated(case)
    if not quantizer.whole_steps:
        return
    values = quantizer(samples(case) * 1.5).detach()
    integers = (values / quantizer.step.detach()).round()
    assert quantizer.step.numel() == 1
    assert torch.equal(integers * quantizer.step.detach(), values)
    assert integers.abs().max() < 2**24  # exact in float32


def test_which_kinds_have_whole_steps():
    def answer(kind: str, granularity: str = "tensor", groups: int = 1, **options: Any) -> bool:
        spec = Spec.kinds[kind](bits=4, granularity=granularity, **options)
        return spec.build(Layout(-1, groups, batched=True)).whole_steps

    assert answer("LSQ")
    assert answer("Uniform")
    assert answer("PTF", "channel", 4)
    assert not answer("LSQ", offset=True)
    assert not answer("LSQ", "channel", 4)
    assert not answer("Uniform", zero="fractional")
    assert not answer("LogSqrt2")
    assert not answer("BitLog2")


def parameters(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in quantizer.state_dict().items()}


@over_cases
def test_a_row_of_a_table_is_what_set_range_sets(case):
    quantizer = calibrated(case)
    if not quantizer.ranged or quantizer.refines:
        return
    x = quantizer.grouped(samples(case))
    factors = torch.tensor([1.0, 0.7, 0.4])[:, None]  # (K, 1)
    low, high = x.amin(1) * factors, x.amax(1) * factors  # (K, G)
    table = quantizer.from_range(low, high)
    names = {name.removeprefix("log_") for name in parameters(quantizer)}  # a table has the steps themselves
    assert {name: tuple(values.shape) for name, values in table.items()} == dict.fromkeys(
        names, (3, case.layout.groups)
    )
    for k in range(3):
        quantizer.set_range_(low[k], high[k])
        expected = parameters(quantizer)
        quantizer.set_({name: values[k] for name, values in table.items()})
        assert all(torch.equal(values, expected[name]) for name, values in parameters(quantizer).items())


@over_cases
def test_candidates_are_tried_as_if_each_were_set(case):
    """Also values that no range gives: a table is multiples of calibrated parameters."""
    quantizer = calibrated(case)
    if quantizer.refines:
        return  # its parameters do not all have a value for each group
    x, before = quantizer.grouped(samples(case)), parameters(quantizer)  # (G, n)
    shares = torch.tensor([1.0, 0.6, 1.37])[:, None]
    table = {name: values * shares if name == "step" else values.expand(3, -1) for name, values in before.items()}
    trial = quantizer.tried(table)
    found = trial(x.expand(3, -1, -1).reshape(3 * len(x), -1)).view(3, *x.shape)
    assert all(torch.equal(values, before[name]) for name, values in parameters(quantizer).items())
    for k in range(3):
        single = quantizer.spec.build(Layout(0, case.layout.groups, batched=False))
        single.set_({name: values[k] for name, values in table.items()})
        assert torch.equal(found[k], single(x.reshape(case.layout.groups, -1)))


@over_cases
def test_a_kind_without_a_range_says_so(case):
    quantizer = calibrated(case)
    if not quantizer.ranged or quantizer.refines:
        with pytest.raises(NotImplementedError, match=case.kind):
            quantizer.from_range(torch.zeros(1), torch.ones(1))
