"""What every quantizer promises, at every width, sign and granularity. Shapes: B images, H heads, N tokens, D width."""

import copy
import pickle
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import qat.quantizers  # noqa: F401  registers the kinds
from qat.quantizers import Quantizer
from qat.quantizers.spec import Layout, Spec

# Options of each kind worth a run of their own. A kind that has only one sign fixes it here: {"signed": False}.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "LSQ": [{}, {"offset": True}],
    "LogSqrt2": [{"signed": False, "zero": zero} for zero in ("last", "extra", "rounded")],
    "BitLog2": [
        {"signed": False, "bits": bits, "form": form, "extra": extra}
        for bits in (2, 3, 4)  # no more: its integers have up to 2**bits bits
        for form in ("single", "half")
        for extra in (False, True)
    ],
    "PTF": [{"signed": False, "granularity": "channel", "zero": zero} for zero in ("code", "clipped")],
    "Uniform": [{}, {"zero": "code"}, {"zero": "clipped"}, {"zero": "fractional", "signed": False}, {"zero": "none"}],
}
ROWS = {"IntegerNorm", "LogIntSoftmax"}  # kinds whose codes depend on a whole row: each has tests of its own
SHAPES = {True: (4, 2, 3, 4), False: (6, 10)}  # activation (B, H, N, D), weight (O, I)
LAYOUTS = {
    "tensor": [Layout(0, 1, batched=True)],
    "channel": [Layout(-1, 4, batched=True), Layout(0, 6, batched=False)],
    "head": [Layout(1, 2, batched=True)],
    "qkv": [Layout(0, 3, batched=False)],
}


class Case(NamedTuple):
    kind: str
    options: tuple[tuple[str, Any], ...]
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.layout.batched]


def cases() -> list[Case]:
    found = {
        Case(kind, tuple(sorted(full.items())), layout)
        for kind, examples in EXAMPLES.items()
        for options in examples
        for bits in (2, 3, 4, 8)
        for signed in (True, False)
        for cut, layouts in LAYOUTS.items()
        if options.get("granularity", cut) == cut
        for full in [{"bits": bits, "signed": signed, "granularity": cut, **options}]
        for layout in layouts
    }
    return sorted(found, key=str)


def name(case: Case) -> str:
    options = "-".join(f"{key}={value}" for key, value in case.options)
    return f"{case.kind}-{options}-{'activation' if case.layout.batched else 'weight'}"


every_case = pytest.mark.parametrize("case", cases(), ids=name)
every_activation = pytest.mark.parametrize("case", [case for case in cases() if case.layout.batched], ids=name)


def samples(case: Case) -> Tensor:
    """Values with outliers; not negative where the codes are not, unless an offset brings them there."""
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    x = x * x.abs()
    return x if dict(case.options)["signed"] else x.abs()


@cache
def _calibrated(case: Case) -> Quantizer:
    quantizer = Spec.kinds[case.kind](**dict(case.options)).build(case.layout)
    quantizer.init_from(quantizer.grouped(samples(case)))
    return quantizer


def calibrated(case: Case) -> Quantizer:
    return copy.deepcopy(_calibrated(case))


def spread(case: Case, values: Tensor) -> Tensor:
    """A tensor in which every group has all of ``values``."""
    if not case.layout.batched:
        return values.expand(case.shape[0], -1)
    return values.view(-1, 1, 1, 1).expand(-1, *case.shape[1:])


def all_codes(case: Case, quantizer: Quantizer) -> Tensor:
    """Every code in every group."""
    codes = torch.arange(quantizer.spec.qmin, quantizer.spec.qmin + quantizer.spec.levels)
    return spread(case, codes.to(quantizer.code_dtype))


def test_every_quantizer_has_an_example():
    missing = {kind for kind, spec in Spec.kinds.items() if spec.__module__.startswith("qat.")} - EXAMPLES.keys() - ROWS
    assert not missing, f"add {{kind: [options]}} for {sorted(missing)} to EXAMPLES at the top of this file"


@every_case
def test_a_group_has_at_most_the_declared_codes_over_exactly_the_declared_range(case):
    quantizer = calibrated(case)
    line = torch.linspace(-1, 1, 101)
    x = spread(case, torch.cat([line * 1e3, line]))  # wide and fine
    for row in quantizer.grouped(quantizer.encode(x)):
        assert len(row.unique()) <= quantizer.spec.levels
        assert row.min() == quantizer.spec.qmin
        assert row.max() == quantizer.spec.qmax
    for row in quantizer.grouped(quantizer(x)):
        assert len(row.unique()) <= quantizer.spec.levels


@every_case
def test_forward_is_decode_of_encode_bit_for_bit(case):
    quantizer, x = calibrated(case), samples(case) * 1.5
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gets_the_float32_values_rounded_once(case, dtype):
    quantizer, x = calibrated(case), samples(case).to(dtype)
    assert torch.equal(quantizer.encode(x), quantizer.encode(x.float()))
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)).to(dtype))


@every_case
def test_memory_order_does_not_matter(case):
    quantizer, x = calibrated(case), samples(case)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert torch.equal(quantizer(strided), quantizer(x))
    assert torch.equal(quantizer.encode(strided), quantizer.encode(x))


@every_case
def test_quantizing_twice_changes_nothing(case):
    if dict(case.options).get("zero") == "fractional":
        pytest.skip("a zero point that is no integer puts the ends of the range off the grid")
    if case.kind == "BitLog2":
        pytest.skip("its divisor makes up for cutting, so a value is larger than what is cut to it")
    quantizer = calibrated(case)
    codes = all_codes(case, quantizer)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


@every_case
def test_codes_are_the_smallest_integers_that_hold_them(case):
    quantizer = calibrated(case)
    codes = quantizer.encode(samples(case))
    assert codes.shape == case.shape
    fits = quantizer.spec.levels <= 256
    assert codes.dtype == ((torch.int8 if quantizer.spec.signed else torch.uint8) if fits else torch.int32)


@every_case
def test_switched_off_means_untouched(case):
    quantizer, x = calibrated(case), samples(case)
    quantizer.enabled = False
    assert quantizer(x) is x


@every_case
def test_gradients_are_finite_and_reach_every_parameter(case):
    quantizer, x = calibrated(case), (samples(case) * 2).requires_grad_()
    quantizer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all(), name


@every_case
def test_zero_in_gives_a_finite_gradient_and_a_value_near_zero(case):
    quantizer, x = calibrated(case), torch.zeros(case.shape, requires_grad=True)
    out = quantizer(x)
    out.sum().backward()
    values = quantizer.grouped(quantizer.decode(all_codes(case, quantizer)))
    nearest = values.abs().amin(1)  # zero itself, but for an offset
    assert torch.equal(quantizer.grouped(out.detach()).abs().amax(1), nearest)
    assert x.grad.isfinite().all()


@every_activation
@torch.no_grad()
def test_an_empty_batch_passes(case):
    quantizer, x = calibrated(case), samples(case)[:0]
    assert quantizer(x).shape == x.shape
    assert quantizer.encode(x).shape == x.shape


@every_activation
def test_an_empty_batch_passes_while_training(case):
    quantizer, x = calibrated(case), samples(case)[:0].requires_grad_()
    quantizer(x).sum().backward()
    assert quantizer.step.grad.tolist() == [0.0] * quantizer.step.numel()


@every_case
def test_saved_and_strictly_loaded_it_computes_the_same(case):
    quantizer, x = calibrated(case), samples(case)
    fresh = Spec.kinds[case.kind](**dict(case.options)).build(case.layout)
    assert not fresh.calibrated
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert fresh.calibrated
    assert torch.equal(fresh(x), quantizer(x))


@every_case
def test_copies_and_pickles_compute_the_same(case):
    quantizer, x = calibrated(case), samples(case)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(x), quantizer(x))
        assert other.spec == quantizer.spec


@every_case
def test_project_leaves_a_calibrated_quantizer_as_it_is(case):
    quantizer, x = calibrated(case), samples(case)
    before = quantizer(x)
    quantizer.project_()
    assert torch.equal(quantizer(x), before)
