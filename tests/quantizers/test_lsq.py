"""LSQ and LSQ+: codes, gradients and gains against numbers worked out by hand. H heads share nothing; G upstream."""

from dataclasses import dataclass
from math import sqrt

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import LSQ, LSQQuantizer
from qat.quantizers.lsq import MIN_STEP
from qat.quantizers.spec import Layout

WEIGHT = Layout(axis=0, groups=1, batched=False)
ACTIVATION = Layout(axis=0, groups=1, batched=True)


def lsq(step: list[float], layout: Layout = WEIGHT, offset: list[float] | None = None, **options) -> LSQQuantizer:
    quantizer = LSQ(offset=offset is not None, **options).build(layout)
    with torch.no_grad():
        quantizer.step.copy_(torch.tensor(step))
        if offset is not None:
            quantizer.offset.copy_(torch.tensor(offset))
    return quantizer


def gradient(quantizer: LSQQuantizer, x: Tensor, upstream: Tensor | None = None) -> Tensor:
    """d x; those of step and offset are left in their ``grad``."""
    x = x.clone().requires_grad_()
    out = quantizer(x)
    out.backward(torch.ones_like(out) if upstream is None else upstream)
    return x.grad


@dataclass
class Example:
    """One worked example; ``raw`` is the gradient of the step before its gain."""

    bits: int
    signed: bool
    x: list[float]
    step: float
    offset: float | None
    upstream: list[float]
    codes: list[int]
    out: list[float]
    d_x: list[float]
    raw: float
    d_offset: float | None = None

    def quantizer(self, layout: Layout = WEIGHT, grad_scale: str = "none") -> LSQQuantizer:
        offset = None if self.offset is None else [self.offset]
        return lsq([self.step], layout, offset, bits=self.bits, signed=self.signed, grad_scale=grad_scale)


WEIGHT_3_BIT = Example(
    bits=3,
    signed=True,
    x=[-0.90, -0.35, -0.10, 0.04, 0.22, 0.80],
    step=0.2,
    offset=None,
    upstream=[1, -2, 0.5, 1, -1, 2],
    codes=[-4, -2, 0, 0, 1, 3],  # -0.10 / 0.2 rounds to the even code
    out=[-0.8, -0.4, 0, 0, 0.2, 0.6],
    d_x=[0, -2, 0.5, 1, -1, 0],
    raw=2.65,
)
UNSIGNED_WITH_OFFSET = Example(
    bits=2,
    signed=False,
    x=[-0.17, -0.05, 0.02, 0.11, 0.45, 0.95],
    step=0.3,
    offset=-0.1,
    upstream=[1, 2, -1, 0.5, 1, -2],
    codes=[0, 0, 0, 1, 2, 3],
    out=[-0.1, -0.1, -0.1, 0.2, 0.5, 0.8],
    d_x=[0, 2, -1, 0.5, 1, 0],
    raw=-5.6166667,
    d_offset=-1.0,
)
SIGNED_4_BIT = Example(
    bits=4,
    signed=True,
    x=[-1.3, -0.62, 0.07, 0.4, 1.9, 5.0],
    step=0.25,
    offset=None,
    upstream=[1] * 6,
    codes=[-5, -2, 0, 2, 7, 7],
    out=[-1.25, -0.5, 0, 0.5, 1.75, 1.75],
    d_x=[1, 1, 1, 1, 0, 0],
    raw=14.8,
)
EXAMPLES = {
    "weight_3_bit": WEIGHT_3_BIT,
    "unsigned_with_offset": UNSIGNED_WITH_OFFSET,
    "signed_4_bit": SIGNED_4_BIT,
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_codes_and_values_of_the_worked_examples(example):
    quantizer, x = example.quantizer(), torch.tensor(example.x)
    assert quantizer.encode(x).tolist() == example.codes
    torch.testing.assert_close(quantizer(x), torch.tensor(example.out), atol=1e-6, rtol=0)  # decimals in float32


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_gradients_of_the_worked_examples(example):
    quantizer = example.quantizer()
    d_x = gradient(quantizer, torch.tensor(example.x), torch.tensor(example.upstream, dtype=torch.float32))
    assert d_x.tolist() == example.d_x
    assert quantizer.step.grad.item() == pytest.approx(example.raw, rel=1e-6)  # a float32 sum
    if example.offset is not None:
        assert quantizer.offset.grad.item() == example.d_offset


@pytest.mark.parametrize(
    ("example", "grad_scale", "layout", "gained"),
    [
        (WEIGHT_3_BIT, "l1", WEIGHT, 0.9855456044),
        (WEIGHT_3_BIT, "numel", WEIGHT, 0.6246109900),
        (WEIGHT_3_BIT, "vvtq_act", ACTIVATION, 0.3606193232),
        (UNSIGNED_WITH_OFFSET, "vvtq_act", ACTIVATION, -0.7643315),
        (SIGNED_4_BIT, "vvtq_act", ACTIVATION, 14.8 * 0.0583211844),
        (SIGNED_4_BIT, "numel", ACTIVATION, 14.8 * 0.1543033500),
        (SIGNED_4_BIT, "none", ACTIVATION, 14.8),
    ],
)
def test_every_gain_of_the_step_gradient(example, grad_scale, layout, gained):
    quantizer = example.quantizer(layout, grad_scale)
    x = torch.tensor([example.x])  # one sample of six values
    gradient(quantizer, x, torch.tensor([example.upstream], dtype=torch.float32))
    assert quantizer.step.grad.item() == pytest.approx(gained, rel=1e-6)


def test_the_gain_does_not_touch_the_offset():
    quantizer = UNSIGNED_WITH_OFFSET.quantizer(ACTIVATION, "vvtq_act")
    gradient(quantizer, torch.tensor(UNSIGNED_WITH_OFFSET.x), torch.tensor(UNSIGNED_WITH_OFFSET.upstream))
    assert quantizer.offset.grad.item() == UNSIGNED_WITH_OFFSET.d_offset


def test_an_element_exactly_on_either_bound_is_inside():
    quantizer = lsq([0.5], bits=3, grad_scale="none")
    d_x = gradient(quantizer, torch.tensor([-2.0, 1.5, -2.25, 1.75]))  # v = -4, 3, -4.5, 3.5
    assert d_x.tolist() == [1, 1, 0, 0]
    assert quantizer.step.grad.item() == 0 + 0 - 4 + 3


def test_an_exact_zero_on_an_unsigned_grid_is_inside():
    assert gradient(lsq([0.5], bits=2, signed=False), torch.zeros(3)).tolist() == [1, 1, 1]


def test_inside_elements_give_the_offset_exactly_no_gradient():
    quantizer = lsq([0.1], offset=[-0.3], bits=4, signed=False)
    torch.manual_seed(0)
    gradient(quantizer, torch.rand(1000) * 1.4 - 0.28, torch.randn(1000))
    assert quantizer.offset.grad.item() == 0.0


def test_the_two_halves_of_a_tie_round_to_the_even_code():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert lsq([1.0], bits=4).encode(x).tolist() == [-2, 0, 0, 2, 2]


def test_each_head_has_its_own_step_and_l1_norm():
    layout = Layout(axis=0, groups=2, batched=False)
    quantizer = lsq([0.1, 0.5], layout, bits=2, granularity="head", grad_scale="none")
    w = torch.tensor([[0.12, -0.04], [0.26, -0.30], [0.70, -0.20], [-1.30, 0.26]])
    expected = torch.tensor([[0.1, 0], [0.1, -0.2], [0.5, 0], [-1.0, 0.5]])
    torch.testing.assert_close(quantizer(w), expected, atol=1e-7, rtol=0)
    assert gradient(quantizer, w).tolist() == [[0, 1], [0, 0], [0, 1], [0, 1]]
    torch.testing.assert_close(quantizer.step.grad, torch.tensor([0.40, -0.12]), atol=1e-6, rtol=0)
    gain = lsq([0.1, 0.5], layout, bits=2, granularity="head", grad_scale="l1").gain(w)
    assert gain.shape == (4, 1)
    torch.testing.assert_close(gain[::2, 0], torch.tensor([1.1785113, 0.6375767]), rtol=1e-6, atol=0)


def test_numel_counts_one_sample_and_vvtq_act_counts_the_batch():
    x = torch.randn(3, 5, 7)
    numel, vvtq = (lsq([1.0], ACTIVATION, bits=4, grad_scale=kind) for kind in ("numel", "vvtq_act"))
    assert numel.gain(x) == numel.gain(x.repeat(2, 1, 1)) == 1 / sqrt(5 * 7 * 7)
    assert vvtq.gain(x) == 1 / (sqrt(3 * 5 * 7) * 7)
    assert vvtq.gain(x.repeat(2, 1, 1)) == 1 / (sqrt(6 * 5 * 7) * 7)


def test_numel_counts_the_values_of_one_group():
    x = torch.randn(2, 3, 5, 8)  # (B, H, N, D)
    assert lsq([1.0] * 3, Layout(1, 3, True), bits=4, granularity="head").gain(x) == 1 / sqrt(5 * 8 * 7)
    w = torch.randn(6, 10)
    assert lsq([1.0] * 6, Layout(0, 6, False), bits=4, granularity="channel").gain(w) == 1 / sqrt(10 * 7)


def test_l1_is_refused_for_an_activation():
    with pytest.raises(QatError, match="l1 is defined for weights"):
        LSQ(4, grad_scale="l1").build(ACTIVATION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [None, [-0.1]])
def test_half_precision_is_quantized_in_float32(dtype, offset):
    torch.manual_seed(0)
    x, upstream = torch.randn(4, 501).to(dtype), torch.randn(4, 501).to(dtype)
    half, full = (lsq([0.013], ACTIVATION, offset, bits=8) for _ in range(2))
    d_full = gradient(full, x.float(), upstream.float())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(half.encode(x), full.encode(x.float()))
        assert torch.equal(half(x), full(x.float()).to(dtype))
        d_half = gradient(half, x, upstream)
    assert d_half.dtype == dtype
    assert torch.equal(d_half, d_full.to(dtype))
    assert half.step.grad.dtype == torch.float32
    assert torch.equal(half.step.grad, full.step.grad)
    assert offset is None or torch.equal(half.offset.grad, full.offset.grad)


def test_a_frozen_step_still_passes_the_gradient_on():
    quantizer = WEIGHT_3_BIT.quantizer()
    quantizer.requires_grad_(False)
    d_x = gradient(quantizer, torch.tensor(WEIGHT_3_BIT.x), torch.tensor(WEIGHT_3_BIT.upstream))
    assert d_x.tolist() == WEIGHT_3_BIT.d_x
    assert quantizer.step.grad is None


def test_the_step_learns_where_the_input_needs_no_gradient():
    quantizer = SIGNED_4_BIT.quantizer()
    quantizer(torch.tensor(SIGNED_4_BIT.x)).sum().backward()
    assert quantizer.step.grad.item() == pytest.approx(SIGNED_4_BIT.raw, rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (ACTIVATION, {"signed": False, "offset": [-0.1]}),
        (Layout(1, 3, True), {"granularity": "head"}),
        (Layout(0, 4, False), {"granularity": "channel", "grad_scale": "l1"}),
    ],
)
def test_one_graph_without_breaks_computes_the_same(layout, options):
    torch.manual_seed(0)
    quantizer = lsq([0.1] * layout.groups, layout, bits=4, **options)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")  # fullgraph: a break raises
    for batch in (4, 8) if layout.batched else (4,):  # the second batch size makes the shape symbolic
        x, upstream = torch.randn(batch, 3, 5), torch.randn(batch, 3, 5)
        d_x, d_step = gradient(quantizer, x, upstream), quantizer.step.grad.clone()
        quantizer.zero_grad()
        assert torch.equal(compiled(x), quantizer(x))
        assert torch.equal(gradient(compiled, x, upstream), d_x)
        assert torch.equal(quantizer.step.grad, d_step)
        quantizer.zero_grad()


def test_one_graph_of_a_strided_tensor_too():  # q, k and v are views of one projection
    quantizer = lsq([0.1], ACTIVATION, bits=4)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    x = torch.randn(4, 3, 5, requires_grad=True)
    assert torch.equal(compiled(x.mT), quantizer(x.mT))


def test_an_infinite_value_is_clipped_like_any_large_one():
    quantizer = lsq([0.1], bits=4, grad_scale="none")
    d_x = gradient(quantizer, torch.tensor([float("inf"), -float("inf"), 0.1]))
    assert d_x.tolist() == [0, 0, 1]
    assert quantizer.step.grad.item() == 7 - 8


def test_project_keeps_every_step_positive():
    quantizer = lsq([-0.2, 0.0, 0.3], Layout(0, 3, False), bits=4, granularity="channel")
    quantizer.project_()
    torch.testing.assert_close(quantizer.step.detach(), torch.tensor([MIN_STEP, MIN_STEP, 0.3]), rtol=0, atol=0)


def test_a_forgotten_calibration_gives_nan():
    quantizer = LSQ(4, offset=True).build(ACTIVATION)
    assert not quantizer.calibrated
    assert quantizer(torch.randn(5)).isnan().all()


@pytest.mark.parametrize(
    ("option", "value"), [("grad_scale", "sqrt"), ("init", "best"), ("percentile", 50), ("percentile", 100.1)]
)
def test_an_option_out_of_range_is_refused_with_its_value(option, value):
    with pytest.raises(QatError, match=f"{option} is '?{value}"):
        LSQ(4, **{option: value})
