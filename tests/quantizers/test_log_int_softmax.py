"""Log-Int-Softmax: numbers worked out by hand, and two further ways to compute it. N keys."""

import copy
import pickle
from functools import cache
from math import ceil, exp, floor, log2

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import LogIntSoftmax, LogIntSoftmaxQuantizer, blocks
from qat.quantizers.integer_exp import Exp
from qat.quantizers.integers import rounded_log2
from qat.quantizers.log_int_softmax import FINEST, LONGEST, inverses
from qat.quantizers.spec import Layout

LAYOUT = Layout(0, 1, batched=True)
RELEASED = {"zero": "extra", "extra_bits": 0}
OPTIONS = [{}, RELEASED, {"zero": "none"}, {"bits": 2}, {"bits": 8, "zero": "extra"}, {"logit_bits": 4}]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
SCALES = [0.01, 0.02, 0.05, 1 / 16, 0.1, 0.2]


def softmax(step: float = 1 / 16, zero_point: int = 128, **options) -> LogIntSoftmaxQuantizer:
    quantizer = LogIntSoftmax(**{"bits": 4, **options}).build(LAYOUT)
    with torch.no_grad():
        quantizer.step.fill_(step)
        quantizer.zero_point.fill_(zero_point)
    return quantizer


@cache
def logits(*shape: int) -> Tensor:
    return torch.randn(*shape or (3, 2, 5, 17), generator=torch.Generator().manual_seed(0)) * 3


def calibrated(**options) -> LogIntSoftmaxQuantizer:
    quantizer = LogIntSoftmax(**{"bits": 4, **options}).build(LAYOUT)
    quantizer.init_from(logits().reshape(1, -1))
    return quantizer


def exp_of(step: float, keys: int) -> Exp:
    """The constants of a step."""
    return Exp.of(torch.tensor([step], dtype=torch.float64), keys)


def numbers(constants: Exp) -> tuple[int, ...]:
    """b, c, x0 and n as Python's integers."""
    return tuple(int(value) for value in constants)


def exponentials(quantizer: LogIntSoftmaxQuantizer, keys: int) -> Tensor:
    """E, float64, of every distance up to the one from which on all have the same."""
    E, farthest = quantizer.exponentials(keys, LONGEST)
    return E[: int(farthest) + 1]


def in_int64(distances: Tensor, exps: Tensor) -> Tensor:
    """k with integers of 64 bits, from the distances and E of every distance."""
    E = exps.long()[distances.long()]
    return rounded_log2((2 * E.sum(-1, keepdim=True) + E) // (2 * E))


def in_float64(distances: Tensor, exps: Tensor) -> Tensor:
    """k as the quantizer computes it."""
    return rounded_log2(inverses(distances.clone(), exps))


def in_floating_point(codes: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """k as the authors' code computes it, in float64, and where sum / E is a tie, which it rounds to even."""
    x = codes.double() - codes.double().amax(-1, keepdim=True)
    x0 = floor(-0.6931 / s)
    x = x.clamp(min=30 * x0)
    q = (x / x0).floor()
    r = x - x0 * q
    E = ((r * (r + floor(0.96963238 / 0.35815147 / s)) + floor(1 / 0.35815147 / s**2)) * 2 ** (30 - q)).floor()
    ratio = E.sum(-1, keepdim=True) / E
    msb = ratio.round().log2().floor()
    return msb + (ratio.round() - 2**msb >= 2 ** (msb - 1)), ratio % 1 == 0.5


def in_python(row: list[int], constants: Exp) -> list[int]:
    """k of integer logits with Python's own integers."""
    b, c, x0, n = numbers(constants)
    E = []
    for logit in row:
        x = max(logit - max(row), n * x0)
        q, r = x // x0, x % x0  # Python's remainder has the sign of x0
        E.append((r * (r + b) + c) << (n - q))
    v = [(2 * sum(E) + e) // (2 * e) for e in E]
    return [(value * 4 // 3).bit_length() - 1 for value in v]  # 4/3: 1.5 * 2**k becomes 2**(k + 1)


def test_a_row_of_the_worked_example():
    row = torch.tensor([40, 36, 28, 16, 0, -40, -120])
    table = exp_of(1 / 16, keys=7)
    E = table(row - 40)
    assert E.sum() == 2023036289024
    assert ((2 * E.sum() + E) // (2 * E)).tolist() == [3, 3, 5, 11, 27, 278, 27660]
    assert (E * 256 // E.sum()).tolist() == [97, 75, 48, 24, 9, 0, 0]  # as BitLog2 takes them
    quantizer = softmax(zero_point=120, **RELEASED)
    assert quantizer.encode(row / 16).tolist() == [2, 2, 2, 3, 5, 8, 15]
    values = quantizer(row / 16)
    assert values.tolist() == [0.25, 0.25, 0.25, 0.125, 0.03125, 0.00390625, 0.000030517578125]
    assert values.sum().item() == pytest.approx(0.910186767578125, abs=1e-7)


@every_option
@pytest.mark.parametrize(("keys", "k"), [(1, 0), (2, 1), (3, 2), (5, 2), (6, 3), (197, 8)])
def test_equal_logits(keys, k, options):
    quantizer = softmax(**options)
    last = quantizer.spec.qmax
    assert quantizer.encode(torch.full((keys,), 1.3)).tolist() == [min(k, last)] * keys


def random_codes(rows: int = 512) -> Tensor:
    """Integer logits (rows, 197) of narrow and of wide distributions, and rows with one or two distinct values."""
    generator = torch.Generator().manual_seed(1)
    width = torch.rand(rows, 1, generator=generator) * 100
    codes = (torch.randn(rows, 197, generator=generator) * width + 128).clamp(0, 255).round().long()
    codes[0], codes[1], codes[2, 1:], codes[3, :-1] = 0, 255, 0, 255
    codes[2, 0], codes[3, -1] = 255, 0
    return codes


@pytest.mark.parametrize("step", SCALES)
@pytest.mark.parametrize("extra_bits", [0, 8])
def test_int64_and_float64_agree_bit_for_bit(step, extra_bits):
    """600,000 codes each way: sums stay below 2**53, so float64 rounds nothing (see `qat.quantizers.integers`)."""
    codes = random_codes()
    E = exponentials(softmax(step, extra_bits=extra_bits), keys=197)
    d = (codes.amax(-1, keepdim=True) - codes).clamp(max=len(E) - 1).int()
    assert torch.equal(in_float64(d, E), in_int64(d, E))


@pytest.mark.parametrize("step", SCALES)
def test_every_distance_among_few_keys_agrees_too(step):
    E = exponentials(softmax(step, extra_bits=0), keys=197)
    d = torch.stack(torch.meshgrid(torch.arange(len(E)), torch.arange(256), indexing="ij"), -1).reshape(-1, 2)
    d = torch.cat([torch.zeros(len(d), 1), d.clamp(max=len(E) - 1)], 1).int()  # (., 3): the largest, and any two
    assert torch.equal(in_float64(d, E), in_int64(d, E))


@pytest.mark.parametrize("step", SCALES)
def test_the_released_arithmetic_in_float64_agrees_but_for_ties(step):
    codes = random_codes()
    k, tie = in_floating_point(codes, step)
    ours = softmax(step, 0, **RELEASED).encode(codes * torch.tensor(step))
    assert torch.equal(torch.where(tie, 0, ours), torch.where(tie, 0, k.clamp(max=16)).to(ours.dtype))
    assert tie.double().mean() < 1e-3


@pytest.mark.parametrize("step", SCALES)
@pytest.mark.parametrize("extra_bits", [0, 3, 8])
def test_python_integers_agree(step, extra_bits):
    quantizer = softmax(step, 0, extra_bits=extra_bits)
    shift = next(m for m in range(extra_bits + 1) if m == extra_bits or quantizer.step.item() / 2**m <= FINEST)
    constants = exp_of(quantizer.step.item() / 2**shift, keys=197)
    codes = random_codes(8)
    expected = [[min(k, 15) for k in in_python([c << shift for c in row], constants)] for row in codes.tolist()]
    assert quantizer.encode(codes * quantizer.step.detach()).tolist() == expected


def errors_of_exp(step: float, **options) -> Tensor:
    """Relative errors of exp from 0 down to -10, against the value at 0."""
    E = exponentials(softmax(step, **options), keys=197)[: floor(10 / step + 1e-6) + 1]
    return E / E[0] / (torch.arange(len(E)) * -step).double().exp() - 1


@pytest.mark.parametrize(
    ("step", "at_five", "worst"),
    [(0.02, 0.052, 0.10), (0.05, 0.051, 0.10), (0.1, 0.051, 0.10), (1 / 16, 0.41, 1.10), (0.2, 0.89, 2.6)],
)
def test_coarse_steps_inflate_small_probabilities_and_extra_bits_repair_it(step, at_five, worst):
    released, strict = errors_of_exp(step, extra_bits=0), errors_of_exp(step)
    assert released[round(5 / step)].item() == pytest.approx(at_five, rel=0.07)
    assert released.max().item() == pytest.approx(worst, rel=0.07)
    assert strict.abs().max() < 0.015


@every_option
def test_what_the_last_code_stands_for(options):
    quantizer = softmax(**options)
    spec = quantizer.spec
    values = quantizer.decode(torch.arange(spec.levels, dtype=quantizer.code_dtype))
    powers = spec.levels - (spec.zero != "none")
    assert torch.equal(values[:powers], torch.tensor([2.0**-k for k in range(powers)]))
    assert values[powers:].tolist() == [0.0] * (spec.zero != "none")


@pytest.mark.parametrize(("zero", "levels", "far"), [("last", 16, 0.0), ("extra", 17, 0.0), ("none", 16, 2.0**-15)])
def test_the_three_zeros(zero, levels, far):
    quantizer = softmax(zero=zero)
    assert quantizer.spec.levels == levels
    assert quantizer(torch.tensor([8.0, -8.0])).tolist() == [1.0, far]
    row = torch.tensor([5.0, -5.375])  # a probability of 2**-14.97
    assert quantizer(row)[1].item() == (0.0 if zero == "last" else 2.0**-15)


def test_the_value_is_within_a_factor_of_the_probability():
    x = (logits(4, 3, 20, 197) / 0.11).round() * 0.11
    values = softmax(step=0.11, zero="none", bits=5)(x)
    probs = x.clamp(-128 * 0.11, 127 * 0.11).softmax(-1)
    ratio = (values / probs)[probs > 2**-20]  # what is smaller may be cut off by n
    exp_error = 1.015
    assert ratio.min() > 0.625 / exp_error  # p = 0.4: v = 2.5 is rounded to 3, and 1/3 to 1/4
    assert ratio.max() < 1.5 * exp_error  # v just below 1.5 * 2**k


@every_option
@pytest.mark.parametrize("hidden", [-100.0, float("-inf")])
def test_hidden_keys_are_as_if_they_were_not_there(hidden, options):
    quantizer, x = softmax(**options), logits(6, 12)
    mask = torch.zeros(6, 12)
    mask[:, 8:] = hidden
    codes, alone = quantizer.encode(x, mask), quantizer.encode(x[:, :8])
    assert torch.equal(codes[:, :8], alone)
    assert (codes[:, 8:] >= min(quantizer.spec.qmax, 22)).all()
    if quantizer.spec.zero != "none" and quantizer.spec.width <= 4:
        assert (quantizer(x, mask)[:, 8:] == 0).all()


@pytest.mark.parametrize("step", [FINEST, 0.02, 3.0])
def test_a_hidden_key_is_hidden_at_every_step(step):
    quantizer = softmax(step, zero_point=0)
    x = torch.zeros(2, 49)
    x[:, 0] = 1e9  # the lowest logit hides nothing, the highest is hidden
    mask = torch.zeros(2, 49)
    mask[:, 0] = -1e4
    assert quantizer.encode(x, mask).tolist() == [[15] + [6] * 48] * 2


def test_a_mask_is_broadcast_and_rounded():
    quantizer, x = softmax(step=1 / 8), logits(2, 3, 4, 5)
    mask = torch.randn(2, 1, 4, 5)
    rounded = (mask * 8).round() / 8
    assert ((x + rounded) * 8).abs().amax() < 127
    assert torch.equal(quantizer(x, mask), quantizer(x, rounded))
    on_grid = (x * 8).round() / 8
    assert torch.equal(quantizer(on_grid, rounded), quantizer(on_grid + rounded))


def test_logits_beyond_the_range_are_clipped():
    quantizer = softmax(step=0.1, zero_point=10)
    assert torch.equal(quantizer(torch.tensor([-9.0, 1e9])), quantizer(torch.tensor([-1.0, 24.5])))


def test_the_range_of_the_logits_need_not_contain_zero():
    quantizer = LogIntSoftmax(4).build(LAYOUT)
    quantizer.set_range_(torch.tensor([10.0]), torch.tensor([35.5]))
    assert quantizer.step.item() == pytest.approx(0.1)
    assert quantizer.zero_point.tolist() == [-100]
    x = 10 + torch.rand(4, 9) * 20
    assert torch.equal(quantizer.encode(x), softmax(quantizer.step.item(), 0).encode(x - 10))


def test_a_step_is_never_finer_than_what_exp_can_tell():
    quantizer = LogIntSoftmax(4).build(LAYOUT)
    quantizer.init_from(torch.zeros(1, 8))
    assert quantizer.step.item() == FINEST
    assert quantizer.encode(torch.zeros(2, 197)).unique().tolist() == [8]
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
    quantizer.project_()
    assert quantizer.step.item() == FINEST


def test_the_target_and_the_switched_off_module_are_the_float_softmax():
    quantizer, x, mask = calibrated(), logits(), torch.randn(5, 17)
    assert torch.equal(quantizer.target(x), x.softmax(-1))
    assert torch.equal(quantizer.target(x, mask), (x + mask).softmax(-1))
    quantizer.enabled = False
    assert torch.equal(quantizer(x), x.softmax(-1))
    assert torch.equal(quantizer(x, mask), (x + mask).softmax(-1))


def test_the_gradient_is_that_of_the_float_softmax():
    quantizer, mask, upstream = calibrated(), torch.zeros(5, 17), torch.randn(3, 2, 5, 17)
    mask[:, 3] = float("-inf")
    x, y = (logits().clone().requires_grad_() for _ in range(2))
    quantizer(x, mask).backward(upstream)
    (y + mask).softmax(-1).backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    assert quantizer.step.grad.tolist() == [0.0]


@every_option
def test_no_more_codes_than_declared(options):
    quantizer = calibrated(**options)
    x = torch.cat([logits() * factor for factor in (0.1, 1, 10)])
    codes = quantizer.encode(x)
    assert codes.dtype == (torch.uint8 if quantizer.spec.levels <= 256 else torch.int32)
    assert codes.min() >= 0
    assert codes.max() <= quantizer.spec.qmax == quantizer.spec.levels - 1
    assert len(quantizer(x).unique()) <= quantizer.spec.levels


@every_option
def test_forward_is_decode_of_encode_bit_for_bit(options):
    quantizer, x = calibrated(**options), logits() * 1.5
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))
    strided = x.mT.contiguous().mT
    assert torch.equal(quantizer(strided), quantizer(x))
    assert quantizer(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gets_the_float32_values_rounded_once(dtype):
    quantizer, x = calibrated(), logits().to(dtype).requires_grad_()
    out = quantizer(x)
    assert out.dtype == dtype
    assert torch.equal(out, quantizer(x.float()).to(dtype))
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


@every_option
def test_saved_copied_or_pickled_it_computes_the_same(options):
    quantizer, x = calibrated(**options), logits()
    fresh = LogIntSoftmax(**{"bits": 4, **options}).build(LAYOUT)
    assert not fresh.calibrated
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert fresh.calibrated
    for other in (fresh, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(x), quantizer(x))
    before = quantizer(x)
    quantizer.project_()
    assert torch.equal(quantizer(x), before)


def test_a_forgotten_calibration_is_named():
    with pytest.raises(QatError, match="LogIntSoftmax has no step yet"):
        LogIntSoftmax(4).build(LAYOUT)(logits())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signed": True}, "unsigned codes"),
        ({"granularity": "head"}, "one step"),
        ({"logit_bits": 9}, "logit_bits is 9"),
        ({"logit_bits": 1}, "logit_bits is 1"),
        ({"extra_bits": -1}, "extra_bits is -1"),
        ({"extra_bits": True}, "extra_bits is True"),
        ({"zero": "first"}, "zero is 'first'"),
        ({"bits": 9}, "bits is 9"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(QatError, match=message):
        LogIntSoftmax(**{"bits": 4, **options})


def test_exp_of_the_worked_example_against_the_real_one():
    assert [exp(-5 / 16), exp(-24 / 16)] == pytest.approx([0.731615629, 0.22313016])
    E = exponentials(softmax(1 / 16), keys=197)
    assert (E[[5, 24]] / E[0]).tolist() == pytest.approx([0.731615629, 0.22313016], rel=5e-3)


@torch.no_grad()
def test_attention_times_values_is_shifts_of_integers():
    """Sum of (V - z) << (15 - k) over the keys, in int64, is 2**15 times the product of the values (FQ-ViT, LIS)."""
    generator = torch.Generator().manual_seed(4)
    quantizer = LogIntSoftmax(4).build(Layout(0, 1, batched=True))
    logits = torch.randn(3, 5, 197, generator=generator) * 4
    quantizer.init_from(logits.reshape(1, -1))
    codes = quantizer.encode(logits).long()
    V = torch.randint(-255, 256, (3, 197, 8), generator=generator)  # code - zero of 8 bits
    shifts = torch.where(codes == 15, 0, 1 << (15 - codes))  # the last code is zero
    shifted = shifts @ V
    assert shifted.abs().max() < 2**24  # 25 bits with the sign
    assert torch.equal(shifted.double() / 2**15, quantizer.decode(codes.to(torch.uint8)).double() @ V.double())


def test_the_host_never_waits_for_an_accelerator():
    """Tensors without values refuse whatever would have to read one."""
    for options in OPTIONS:
        quantizer = softmax(**options).to("meta")
        x, mask = torch.empty(3, 2, 5, 17, device="meta", requires_grad=True), torch.empty(5, 17, device="meta")
        for args in ((x,), (x, mask)):
            quantizer(*args).sum().backward()
            assert quantizer.encode(*args).shape == x.shape


@every_option
def test_blocks_of_rows_change_nothing(options, monkeypatch):
    quantizer, x, mask = calibrated(**options), logits(3, 2, 40, 17), torch.randn(3, 1, 40, 17)
    whole = quantizer(x), quantizer(x, mask), quantizer.encode(x)
    monkeypatch.setattr(blocks, "CPU_BLOCK", 100)
    cut = quantizer(x), quantizer(x, mask), quantizer.encode(x)
    assert all(torch.equal(*both) for both in zip(whole, cut, strict=True))


def test_a_row_with_a_nan_is_nan():
    x = logits().clone()
    x[0, 1, 2, 3] = torch.nan
    for zero in ("last", "extra", "none"):
        values = calibrated(zero=zero)(x)
        assert values[0, 1, 2].isnan().all()
        assert values.isnan().sum() == 17


@pytest.mark.parametrize("keys", [1, 2, 17, 197, 1000])
def test_random_rows_of_exponentials_agree_with_int64(keys):
    """Also with sums that fill 53 bits and with quotients next to n + 1/2, where a power of two ends."""
    generator = torch.Generator().manual_seed(keys)
    top = 2**53 // (keys + 1)
    E = (2 ** (torch.rand(2000, generator=generator, dtype=torch.float64) * 53)).long().clamp(1, top)
    distances = torch.randint(2000, (500, keys), generator=generator)
    assert torch.equal(in_float64(distances.int(), E.double()), in_int64(distances, E))
    for half in (3, 5, 11, 23, 47, 3 * 2**20 - 1):  # 2 sum = half * E, and one off: E and the rest of the row
        one = 2 * torch.randint(1, max(2, top // half), (400,), generator=generator)
        rest = half * one // 2 - one
        table = torch.stack([one, rest - 1, rest, rest + 1], 1).clamp(min=1)
        for k, row in enumerate(table):
            E = row.repeat(1)
            pairs = torch.tensor([[0, 1], [0, 2], [0, 3]])
            assert torch.equal(in_float64(pairs.int(), E.double()), in_int64(pairs, E)), (half, k)


def test_a_step_next_to_a_power_of_two_is_shifted_as_often_as_by_python():
    for extra_bits in (0, 3, 8):
        for step in (FINEST, 2 * FINEST, 4 * FINEST, 0.25):
            for near in (step, step * (1 - 2**-23), step * (1 + 2**-22)):
                quantizer = softmax(near, extra_bits=extra_bits)
                exact = quantizer.step.item()
                shift = min(extra_bits, max(0, ceil(log2(exact / FINEST))))
                b, c, x0, n = numbers(exp_of(exact / 2**shift, keys=197))
                farthest = ceil(n * -x0 / 2**shift)
                E, found = quantizer.exponentials(197, LONGEST)
                assert int(found) == farthest < LONGEST
                assert E[1] == (lambda r: (r * (r + b) + c) << n)(-(1 << shift)) if 1 << shift < -x0 else True
                assert E[farthest:].unique().numel() == 1
