"""What every quantizer promises. A test runs over all cases of an example, and a failure names the case."""

from __future__ import annotations

import copy
import pickle

import torch

from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term, whole
from tests.contracts.quantizer_cases import EXAMPLES, ROWS, all_codes, calibrated, over_cases, samples, spread


def test_every_quantizer_has_an_example():
    missing = {kind for kind, spec in Spec.kinds.items() if spec.__module__.startswith("qat.")} - EXAMPLES.keys() - ROWS
    assert not missing, f"add {{kind: [options]}} for {sorted(missing)} to EXAMPLES in quantizer_cases.py"


TWO_CODES = ("TwinGelu", "TwinSoftmax", "DFQ", "SULQ")  # values that two codes may stand for


@over_cases
def test_a_group_has_at_most_the_declared_codes_over_exactly_the_declared_range(case):
    quantizer = calibrated(case)
    line = torch.linspace(-1, 1, 101)
    x = spread(case, torch.cat([line * 1e3, line, line * 1e-3]))  # wide and fine
    for row in quantizer.grouped(quantizer.encode(x)):
        assert len(row.unique()) <= quantizer.spec.levels
        if not dict(case.options).get("overlap"):  # there it depends on the exponent which codes come first
            assert row.min() == quantizer.spec.qmin
        assert row.max() == quantizer.spec.qmax
    for row in quantizer.grouped(quantizer(x)):
        assert len(row.unique()) <= quantizer.spec.levels


@over_cases
def test_forward_is_decode_of_encode_bit_for_bit(case):
    quantizer, x = calibrated(case), samples(case) * 1.5
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))


@over_cases
def test_half_precision_gets_the_float32_values_rounded_once(case):
    for dtype in (torch.float16, torch.bfloat16):
        quantizer, x = calibrated(case), samples(case).to(dtype)
        assert torch.equal(quantizer.encode(x), quantizer.encode(x.float()))
        assert quantizer(x).dtype == dtype
        assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)).to(dtype))


@over_cases
def test_memory_order_does_not_matter(case):
    quantizer, x = calibrated(case), samples(case)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert torch.equal(quantizer(strided), quantizer(x))
    assert torch.equal(quantizer.encode(strided), quantizer.encode(x))


@over_cases
def test_quantizing_twice_changes_nothing(case):
    if dict(case.options).get("zero") == "fractional":
        return  # a zero point that is no integer puts the ends of the range off the grid
    if case.kind == "BitLog2":
        return  # its divisor makes up for cutting, so a value is larger than what is cut to it
    if dict(case.options).get("shifted"):
        return  # many values are smaller than the rounding of their sum with the shift
    if dict(case.options).get("overlap"):
        return  # a value is larger by the range of the fine grid
    quantizer = calibrated(case)
    codes = all_codes(case, quantizer)
    values = quantizer.decode(codes)
    again = quantizer.encode(values)
    assert torch.equal(quantizer.decode(again), values)
    assert case.kind in TWO_CODES or torch.equal(again, codes)


@over_cases
def test_codes_are_the_smallest_integers_that_hold_them(case):
    quantizer = calibrated(case)
    codes = quantizer.encode(samples(case))
    assert codes.shape == case.shape
    fits = quantizer.spec.levels <= 256
    assert codes.dtype == ((torch.int8 if quantizer.spec.signed else torch.uint8) if fits else torch.int32)


@over_cases
def test_switched_off_means_untouched(case):
    quantizer, x = calibrated(case), samples(case)
    quantizer.enabled = False
    assert quantizer(x) is x


@over_cases
def test_gradients_are_finite_and_reach_every_parameter(case):
    quantizer, x = calibrated(case), (samples(case) * 2).requires_grad_()
    quantizer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all(), name


@over_cases
def test_zero_in_gives_a_finite_gradient_and_a_value_near_zero(case):
    quantizer, x = calibrated(case), torch.zeros(case.shape, requires_grad=True)
    out = quantizer(x)
    out.sum().backward()
    assert x.grad.isfinite().all()
    if dict(case.options).get("shifted"):
        return  # zero lies between two values of a logarithm, which do not meet halfway
    values = quantizer.grouped(quantizer.decode(all_codes(case, quantizer)))
    nearest = values.abs().amin(1)  # zero itself, but for an offset
    assert torch.equal(quantizer.grouped(out.detach()).abs().amax(1), nearest)


@over_cases
def test_an_empty_batch_passes(case):
    if not case.layout.batched:
        return
    quantizer, x = calibrated(case), samples(case)[:0].requires_grad_()
    assert quantizer.encode(x).shape == x.shape
    with torch.no_grad():
        assert quantizer(x).shape == x.shape
    quantizer(x).sum().backward()
    assert all(parameter.grad.tolist() == [0.0] * parameter.numel() for parameter in quantizer.parameters())


@over_cases
def test_saved_and_strictly_loaded_it_computes_the_same(case):
    quantizer, x = calibrated(case), samples(case)
    fresh = case.build()
    assert not fresh.calibrated
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert fresh.calibrated
    assert torch.equal(fresh(x), quantizer(x))


@over_cases
def test_copies_and_pickles_compute_the_same(case):
    quantizer, x = calibrated(case), samples(case)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(x), quantizer(x))
        assert other.spec == quantizer.spec


@over_cases
def test_project_leaves_a_calibrated_quantizer_as_it_is(case):
    quantizer, x = calibrated(case), samples(case)
    before = quantizer(x)
    quantizer.project_()
    assert torch.equal(quantizer(x), before)


@over_cases
def test_the_host_never_waits_for_an_accelerator(case):
    """Tensors without values refuse whatever would have to read one."""
    quantizer = calibrated(case).to("meta")
    x = torch.empty(case.shape, device="meta", requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.encode(x).device.type == "meta"
    assert x.grad.shape == x.shape


@over_cases
def test_what_codes_stand_for_is_whole_numbers_times_factors(case):
    """To the rounding of decode in float32; a power that is cut has 2**-40 of the largest one."""
    quantizer = calibrated(case)
    codes = all_codes(case, quantizer)
    terms, expected = quantizer.terms(codes), quantizer.decode(codes).double()
    assert all(term.integers.dtype == torch.int64 and term.integers.shape == codes.shape for term in terms)
    found = whole([Term(term.integers, term.factor.double()) for term in terms])
    largest = sum(float((term.integers * term.factor).abs().max()) for term in terms)
    is_one_sum = any(bool((term.integers == 1).all()) for term in terms)
    tolerance = largest * (2.0**-22 if is_one_sum else 2.0**-38)
    torch.testing.assert_close(found, expected, rtol=2.0**-21, atol=tolerance)
