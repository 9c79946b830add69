"""The integer LayerNorm: numbers worked out by hand, and int64 against float64. T tokens, C channels."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat import build_float, build_recipe, calibrate, quantize
from qat.errors import QatError
from qat.quantizers import PTF, IntegerNorm, IntegerNormQuantizer, Uniform, blocks
from qat.quantizers import integer_norm as integer_norm_module
from qat.quantizers.integer_norm import LARGEST, fixed_point, integer_norm, moments, released_norm
from qat.quantizers.integers import isqrt, leading_bits
from qat.quantizers.layout import Layout
from tests.conftest import TINY

LAYOUT = Layout(0, 1, batched=True)
both = pytest.mark.parametrize("arithmetic", ["integer", "released"])

STEP = 0.02
GAMMA, BETA = torch.tensor([1, 0.5, 2, -1.5, 0.25]), torch.tensor([0.1, -0.2, 0, 0.3, 0.05])
I = torch.tensor(  # noqa: E741  (T, C): the letter of the equations
    [[9, -114, 216, 416, -248], [-17, 126, -154, -388, 632], [5, 65, 30, 52, 1024], [13, -55, -222, 272, -1016]]
)
OFFICIAL = torch.tensor(
    [[-5, -28, 67, -99, -14], [-3, -4, -57, 109, 24], [-24, -21, -52, 50, 27], [30, -2, -5, -66, -21]]
)


def norm(step: float = STEP, zero_point: int = 128, **options) -> IntegerNormQuantizer:
    quantizer = IntegerNorm(**{"bits": 8, **options}).build(LAYOUT)
    with torch.no_grad():
        quantizer.step.fill_(step)
        quantizer.zero_point.fill_(zero_point)
    return quantizer


def scaled(values: Tensor, step: float = STEP) -> Tensor:
    return values.double() / step


def in_float64(integers: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """What the quantizer computes."""
    return integer_norm(integers.double(), *fixed_point(gamma, beta))


def in_int64(integers: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The equations of the file with integers of 64 bits and shifts."""
    G = (gamma.clamp(-LARGEST, LARGEST) * 2**20).round().long()
    B = (beta.clamp(-LARGEST, LARGEST) * 2**31).round().long()
    C, S = integers.shape[-1], integers.sum(-1, keepdim=True)
    R = isqrt((C * (integers * integers).sum(-1, keepdim=True) - S * S) << 16).clamp(min=1)
    factor = leading_bits(torch.div(G << 19, R, rounding_mode="trunc"), 8)
    return (factor * (C * integers - S) + B + 2**30) >> 31


def float_norm(integers: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """LayerNorm without eps, float64, of gamma / s_o and beta / s_o."""
    x = integers.double()
    x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt() * gamma + beta


def example(C: int = 192, seed: int = 0, tokens: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers of a residual stream with outliers (T, C), gamma, beta, and s_o for codes that span the output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, C, generator=generator) * torch.rand(C, generator=generator).exp().square()
    ptf = PTF(8).build(Layout(-1, C, batched=True))
    ptf.init_from(x.T)
    gamma = torch.rand(C, generator=generator) * 2 - 0.3
    beta = torch.randn(C, generator=generator) * 0.3
    y = F.layer_norm(ptf(x), (C,), gamma, beta).detach()
    return ptf.integers(x), gamma, beta, (y.amax() - y.amin()) / 255


def test_moments_of_the_worked_example():
    S, V = moments(I.double())
    assert S.flatten().tolist() == [279, 199, 1176, -1008]
    assert (I * I).sum(1).tolist() == [294293, 589849, 1056430, 1158718]
    assert V.flatten().tolist() == [1393624, 2909644, 3899174, 4777526]
    assert isqrt(V.long()).flatten().tolist() == [1180, 1705, 1974, 2185]


def test_the_released_arithmetic_of_the_worked_example():
    assert torch.equal(released_norm(I.double(), scaled(GAMMA), scaled(BETA)), OFFICIAL.double())
    y = float_norm(I, scaled(GAMMA), scaled(BETA))
    assert y[0].tolist() == pytest.approx([-4.911, -27.979, 67.852, -99.420, -13.584], abs=1e-3)


def test_the_integers_of_the_worked_example():
    """Two of twenty differ from the released ones: M is another, because C is not in its factor, and 68 is nearer."""
    expected = OFFICIAL.clone()
    expected[0, 2], expected[3, 0] = 68, 29  # of 67.852 and 29.546
    assert torch.equal(in_int64(I, scaled(GAMMA), scaled(BETA)), expected)
    assert torch.equal(in_float64(I, scaled(GAMMA), scaled(BETA)), expected.double())


def test_one_channel_in_python():
    """y[0][0] step by step."""
    G, B = round(1 / STEP * 2**20), round(0.1 / STEP * 2**31)
    R = int((1393624 << 16) ** 0.5)
    quotient = (G << 19) // R
    j = quotient.bit_length() - 8
    M, N = quotient >> j, 31 - j
    assert (M, N) == (173, 12)  # 173 / 2**12 = 0.04224, for 50 / 1180.5 = 0.04235
    assert ((M * (5 * 9 - 279) << j) + B + 2**30) >> 31 == -5


@pytest.mark.parametrize("C", [3, 24, 192, 768, 2048])
def test_int64_and_float64_agree_bit_for_bit(C):
    """A million values: nothing exceeds 2**53 (widths in the file), so float64 rounds nothing."""
    for seed in range(max(1, 100_000 // (300 * C))):
        integers, gamma, beta, step = example(C, seed)
        for factor in (1, 1e-3, 40.0):
            args = gamma.double() * factor / step, beta.double() * factor / step
            assert torch.equal(in_int64(integers.long(), *args).double(), in_float64(integers, *args))


@pytest.mark.parametrize("C", [2, 192, 2048])
@pytest.mark.parametrize("gain", [1e9, -1e9, 16383.0, 1.0, 1e-5, 0.0])
def test_int64_and_float64_agree_at_the_ends(C, gain):
    rows = torch.zeros(6, C, dtype=torch.long)
    rows[0, 0], rows[1] = 1, 2040  # least variance, none
    rows[2, : C // 2], rows[2, C // 2 :] = 2040, -2040 + 4080 * (C == 1)  # the most
    rows[3, 0], rows[4, 0] = 2040, -2040
    rows[5] = torch.arange(C) % 2041
    gamma = torch.full((C,), gain, dtype=torch.float64)
    for beta in (0.0, 1e9, -1e9, 0.5):
        args = gamma, torch.full((C,), beta, dtype=torch.float64)
        exact = in_int64(rows, *args)
        assert exact.abs().max() < 2**21
        assert torch.equal(exact.double(), in_float64(rows, *args))


@pytest.mark.parametrize("C", [192, 384, 768])
def test_how_often_the_two_arithmetics_differ(C):
    integers, gamma, beta, step = example(C)
    args = gamma.double() / step, beta.double() / step
    ours, theirs = in_float64(integers, *args), released_norm(integers.double(), *args)
    y = float_norm(integers, *args)
    assert (ours - theirs).abs().max() == 1
    assert 0 < (ours != theirs).double().mean() < 0.02  # one of a hundred: M is cut from another number
    for out in (ours, theirs):
        error = (out - y)[y.abs() < 128]  # outputs that a code of 8 bits can have
        assert error.abs().max() < 1.7  # 1/2, and 2**-7 of the output
        assert error.abs().mean() < 0.27  # 0.25 is that of rounding


@pytest.mark.parametrize("arithmetic", [in_float64, released_norm])
def test_a_token_without_variance_gets_beta(arithmetic):
    beta = torch.tensor([0.49, 0.51, -2.4, 7.0, 0.0]).double()
    for value in (0.0, 77.0):
        y = arithmetic(torch.full((2, 5), value).double(), scaled(GAMMA), beta)
        assert y.tolist() == [[0, 1, -2, 7, 0]] * 2


@pytest.mark.parametrize("arithmetic", [in_float64, released_norm])
def test_a_channel_without_gamma_gets_beta(arithmetic):
    gamma, beta = torch.tensor([0.0, 1, 1, 1, -0.0]).double(), torch.tensor([3.2, 0, 0, 0, -7.6]).double()
    assert arithmetic(I.double(), gamma, beta)[:, [0, 4]].tolist() == [[3, -8]] * 4


def test_integers_that_are_too_wide_are_refused():
    wide = torch.zeros(2, 2048).double()
    wide[0, 0] = 2.0**18
    with pytest.raises(QatError, match="over 2048 channels reach 262144"):
        moments(wide)


@both
def test_the_output_is_clipped_to_the_codes_and_scaled(arithmetic):
    quantizer = norm(zero_point=60, arithmetic=arithmetic)
    codes = quantizer.encode(torch.zeros(4, 5), I, GAMMA, BETA)
    assert codes.dtype == torch.uint8
    assert codes[0].tolist() == [55, 32, 128 if arithmetic == "integer" else 127, 0, 46]
    assert torch.equal(quantizer(torch.zeros(4, 5), I, GAMMA, BETA), (codes.float() - 60) * quantizer.step)


@both
def test_weight_and_bias_may_be_missing(arithmetic):
    quantizer, y = norm(arithmetic=arithmetic), torch.zeros(4, 5)
    assert torch.equal(quantizer(y, I), quantizer(y, I, torch.ones(5), torch.zeros(5)))


@both
def test_it_approximates_the_float_norm(arithmetic):
    integers, gamma, beta, _ = example()
    y = F.layer_norm(integers, (192,), gamma, beta)
    quantizer = IntegerNorm(8, arithmetic=arithmetic).build(LAYOUT)
    quantizer.init_from(y.reshape(1, -1))
    uniform = Uniform(8).build(LAYOUT)
    uniform.load_state_dict(quantizer.state_dict(), strict=True)
    assert ((quantizer(y, integers, gamma, beta) - uniform(y)).abs() <= 2.01 * quantizer.step).all()
    assert torch.equal(quantizer.encode(y), uniform.encode(y))  # of the float output alone


@both
def test_the_gradient_is_that_of_the_uniform_grid(arithmetic):
    quantizer, uniform = norm(arithmetic=arithmetic), Uniform(8).build(LAYOUT)
    uniform.load_state_dict(quantizer.state_dict())
    upstream = torch.randn(4, 5)
    weight, bias = GAMMA.clone().requires_grad_(), BETA.clone().requires_grad_()
    x = (I * 0.0125).requires_grad_()
    y = F.layer_norm(x, (5,), weight, bias)
    quantizer(y, I, weight, bias).backward(upstream, retain_graph=True)
    found = [x.grad.clone(), weight.grad.clone(), bias.grad.clone()]
    for parameter in (x, weight, bias):
        parameter.grad = None
    uniform(y).backward(upstream)
    for gradient, parameter in zip(found, (x, weight, bias), strict=True):
        assert gradient.isfinite().all()
        assert torch.equal(gradient, parameter.grad)
    assert torch.equal(quantizer.step.grad, uniform.step.grad)


@both
def test_no_more_codes_than_declared_at_every_width(arithmetic):
    integers, gamma, beta, _ = example()
    y = F.layer_norm(integers, (192,), gamma, beta)
    for bits in (2, 4, 8):
        quantizer = IntegerNorm(bits, zero="code", arithmetic=arithmetic).build(LAYOUT)
        quantizer.init_from(y.reshape(1, -1) / 2)
        codes = quantizer.encode(y, integers, gamma, beta)
        assert (codes.min(), codes.max()) == (0, quantizer.spec.qmax)
        values = quantizer(y, integers, gamma, beta)
        assert len(values.unique()) <= quantizer.spec.levels == 2**bits
        assert torch.equal(values, quantizer.decode(codes))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(arithmetic, dtype):
    quantizer, y = norm(arithmetic=arithmetic), torch.zeros(4, 5, dtype=dtype, requires_grad=True)
    out = quantizer(y, I, GAMMA.to(dtype), BETA.to(dtype))
    assert out.dtype == dtype
    assert torch.equal(out, quantizer(y.float(), I, GAMMA.to(dtype).float(), BETA.to(dtype).float()).to(dtype))
    out.sum().backward()
    assert y.grad.isfinite().all()


@both
def test_saved_copied_or_pickled_it_computes_the_same(arithmetic):
    quantizer, args = norm(arithmetic=arithmetic), (torch.zeros(4, 5), I, GAMMA, BETA)
    fresh = IntegerNorm(8, arithmetic=arithmetic).build(LAYOUT)
    assert not fresh.calibrated
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert fresh.calibrated
    for other in (fresh, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(*args), quantizer(*args))
    assert quantizer(args[0][:0], I[:0], GAMMA, BETA).shape == (0, 5)


@both
def test_switched_off_means_untouched(arithmetic):
    quantizer, y = norm(arithmetic=arithmetic), torch.randn(4, 5)
    quantizer.enabled = False
    assert quantizer(y) is y
    assert quantizer(y, I, GAMMA, BETA) is y


@both
def test_a_forgotten_calibration_gives_nan_or_no_value_at_all(arithmetic):
    quantizer = IntegerNorm(8, arithmetic=arithmetic).build(LAYOUT)
    assert quantizer(torch.zeros(4, 5), I, GAMMA, BETA).isnan().all()


def test_an_input_that_is_not_quantized_is_named():
    with pytest.raises(QatError, match="IntegerNorm computes with integers"):
        norm()(torch.zeros(4, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signed": True}, "unsigned codes"),
        ({"granularity": "channel"}, "one step"),
        ({"zero": "fractional"}, "fractional is no integer"),
        ({"arithmetic": "float"}, "arithmetic is 'float'"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(QatError, match=message):
        IntegerNorm(8, **options)


def test_integers_that_are_too_wide_give_nan_where_the_host_does_not_wait(monkeypatch):
    """On an accelerator, which a CPU plays here."""
    wide = torch.zeros(2, 2048)
    wide[0, 0], wide[1, 0] = 2.0**18, 2040
    monkeypatch.setattr(integer_norm_module, "host_reads", lambda device: False)
    values = norm()(torch.zeros(2, 2048), wide)
    assert values[0].isnan().all()
    assert values[1].isfinite().all()


@both
def test_the_host_never_waits_for_an_accelerator(arithmetic):
    """Tensors without values refuse whatever would have to read one."""
    quantizer = norm(arithmetic=arithmetic).to("meta")
    y, integers, gamma, beta = (torch.empty(*shape, device="meta") for shape in ((4, 5), (4, 5), (5,), (5,)))
    y.requires_grad_()
    quantizer(y, integers, gamma, beta).sum().backward()
    assert quantizer.encode(y, integers, gamma, beta).shape == y.shape


@both
def test_blocks_of_rows_change_nothing(arithmetic, monkeypatch):
    integers, gamma, beta, _ = example()
    quantizer, y = norm(arithmetic=arithmetic), torch.zeros(300, 192)
    whole = quantizer(y, integers, gamma, beta), quantizer.encode(y, integers, gamma, beta)
    monkeypatch.setattr(blocks, "CPU_BLOCK", 7 * 192)
    assert torch.equal(quantizer(y, integers, gamma, beta), whole[0])
    assert torch.equal(quantizer.encode(y, integers, gamma, beta), whole[1])


@both
def test_the_output_dies_with_its_last_reference(arithmetic):
    """It is no part of a circle of references, which would keep it until the garbage collector runs."""
    y = torch.zeros(4, 5, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        out = norm(arithmetic=arithmetic)(y, I, GAMMA, BETA)
        alive = weakref.ref(out.untyped_storage()), weakref.ref(out)
        out.sum().backward()
        del out
        assert [found() for found in alive] == [None, None]
    finally:
        gc.enable()


def test_lsq_without_an_offset_is_a_source():
    """Residuals that LSQ quantizes are whole steps, of which the norm computes with integers."""
    residual = {"class_path": "LSQ", "init_args": {"bits": 8}}
    rules = [{"match": match, "spec": residual} for match in ("*_residual_quant", "embed_quant")]
    recipe = build_recipe("fq_vit_888", rules, w_bits=8, a_bits=8)
    model = quantize(build_float("deit_tiny_patch16_224", None, 10, TINY).eval(), recipe)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(model, [images])
    block = model.blocks[1]
    (source,) = block.norm1.source
    assert source is model.blocks[0].mlp_residual_quant
    x = source(torch.randn(2, 17, 24) * 3).detach()
    integers = (x / source.step).round().detach()
    assert torch.equal(integers * source.step, x)
    found = block.norm1(x)
    y = F.layer_norm(x, (24,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    assert torch.equal(found, block.norm1.output_quant(y, integers, block.norm1.weight, block.norm1.bias))
    reached = y.clamp(
        *((end - block.norm1.output_quant.zero_point) * block.norm1.output_quant.step for end in (0, 255))
    )
    assert ((found - reached).abs() <= 2.01 * block.norm1.output_quant.step).all()
    assert model(images).isfinite().all()
