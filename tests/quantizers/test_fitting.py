"""First values of steps and offsets. Shapes: G groups that share a step, n values in a group."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.quantizers import LSQ, LSQQuantizer, fitting
from qat.quantizers.spec import Layout

W = torch.tensor([[-0.90, -0.35, -0.10, 0.04, 0.22, 0.80, 0.61, -0.48]])


def fitted(spec: LSQ, samples: Tensor, batched: bool = False) -> LSQQuantizer:
    quantizer = spec.build(Layout(0, len(samples), batched))
    quantizer.init_from(samples)
    return quantizer


def error(spec: LSQ, x: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Mean squared error (G,) of the grid."""
    codes = ((x - offset[:, None]) / step[:, None]).clamp(spec.qmin, spec.qmax).round()
    return (codes * step[:, None] + offset[:, None] - x).square().mean(1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("bits", "step"), [(2, 2.0), (3, 1.1547005), (4, 0.7559289), (8, 0.1774713)])
def test_lsq_starts_an_activation_from_its_mean(bits, step, signed):
    x = torch.tensor([[0.5, -1.5, 2.0, -0.25, 0.75, -1.0]])  # mean |x| = 1
    spec = LSQ(bits, signed=signed, init="lsq")
    if not signed:  # the reference divides by the signed bound here too; ours takes the bound that the grid has
        step = 2 / (2**bits - 1) ** 0.5
    assert fitted(spec, x, batched=True).step.item() == pytest.approx(step, rel=1e-6)


@pytest.mark.parametrize(
    ("bits", "step", "codes", "mse"),
    [
        (2, 0.628, [-1, -1, 0, 0, 0, 1, 1, -1], 0.032885),
        (3, 0.2803571429, [-3, -1, 0, 0, 1, 3, 2, -2], 0.0042745536),
        (4, 0.1261428571, [-7, -3, -1, 0, 2, 6, 5, -4], 0.00091464286),
        (5, 0.06026017, None, None),
        (6, 0.02880431, None, None),
        (7, 0.01424215, None, None),
        (8, 0.00708595, None, None),
    ],
)
def test_mse_ends_at_the_fixed_point_of_the_alternation(bits, step, codes, mse):
    quantizer = fitted(LSQ(bits), W)
    assert quantizer.step.item() == pytest.approx(step, rel=1e-6)
    if codes:
        assert quantizer.encode(W)[0].tolist() == codes
        assert (quantizer(W) - W).square().mean().item() == pytest.approx(mse, rel=1e-4)  # float32 differences


def test_mse_passes_the_known_iterates(monkeypatch):
    spec, step = LSQ(2), W.abs().amax(1)
    monkeypatch.setattr(fitting, "ALTERNATIONS", 1)
    for expected in (0.6975, 0.628, 0.628):
        step, _ = fitting.alternate(W, step, torch.zeros(1), spec)
        assert step.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("init", "bits", "step"),
    [
        ("lsq", 2, 0.875),
        ("lsq", 3, 0.5051815),
        ("lsq", 4, 0.3307189),
        ("lsq_plus", 2, 0.8569736),
        ("lsq_plus", 3, 0.4284868),
        ("lsq_plus", 4, 0.2142434),
    ],
)
def test_weights_by_the_other_methods(init, bits, step):
    assert fitted(LSQ(bits, init=init), W).step.item() == pytest.approx(step, rel=1e-6)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_alternation_raises_the_error(bits, offset, monkeypatch):
    torch.manual_seed(0)
    x, spec = torch.randn(5, 400) * torch.logspace(-2, 1, 5)[:, None], LSQ(bits, offset=offset)
    step, shift = x.abs().amax(1) / spec.qmax, x.mean(1) * offset
    monkeypatch.setattr(fitting, "ALTERNATIONS", 1)
    before = error(spec, x, step, shift)
    for _ in range(20):
        step, shift = fitting.alternate(x, step, shift, spec)
        after = error(spec, x, step, shift)
        assert (after <= before * (1 + 1e-5)).all()  # sums of 400 values in float32
        before = after


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_offset_fits_the_output_of_gelu_better_than_none(bits):
    torch.manual_seed(0)
    x = F.gelu(torch.randn(1, 4000))
    signed, unsigned, shifted = (
        (fitted(LSQ(bits, signed=signed, offset=offset), x, batched=True)(x) - x).square().mean()
        for signed, offset in ((True, False), (False, False), (False, True))
    )
    assert shifted < unsigned
    assert shifted < signed


def test_groups_are_fitted_independently():
    torch.manual_seed(0)
    x = torch.randn(3, 200) * torch.tensor([[1.0], [10.0], [0.1]])
    together = fitted(LSQ(4, granularity="channel"), x).step
    alone = torch.cat([fitted(LSQ(4), row[None]).step for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=0)  # a group goes on while another one still moves


@pytest.mark.parametrize("init", fitting.METHODS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_a_zero_group_and_a_constant_group_stay_finite(init, batched, offset, signed):
    x = torch.stack([torch.zeros(50), torch.full((50,), 0.7), torch.full((50,), -0.7)])
    quantizer = fitted(LSQ(4, signed=signed, offset=offset, init=init, granularity="channel"), x, batched)
    assert quantizer.calibrated
    assert (quantizer.step > 0).all()
    out = quantizer(x)
    assert out[0].tolist() == [0.0] * 50
    assert out.isfinite().all()


@pytest.mark.parametrize("init", ["mse", "percentile"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("value", [0.7, -0.7])
@pytest.mark.parametrize("offset", [True, False])
def test_a_constant_quantizes_to_itself(init, batched, value, offset):
    x = torch.full((1, 50), value)
    torch.testing.assert_close(fitted(LSQ(4, offset=offset, init=init), x, batched)(x), x, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"offset": True, "signed": False}, {"offset": True}],
    ids=["plain", "unsigned", "signed"],
)
@pytest.mark.parametrize("share", [90.0, 99.0, 99.9, 100.0])
def test_a_percentile_covers_the_stated_share(options, share):
    torch.manual_seed(0)
    x = torch.randn(1, 10_000).exp() - 1  # skewed
    quantizer = fitted(LSQ(4, init="percentile", percentile=share, **options), x, batched=True)
    v = (x - (quantizer.offset if options else 0)) / quantizer.step
    inside = ((v >= quantizer.qmin - 1e-4) & (v <= quantizer.qmax + 1e-4)).float().mean()
    assert 100 * inside.item() == pytest.approx(share, abs=0.03)  # the two ends lie on a value each


@pytest.mark.parametrize("init", ["mse", "percentile"])
def test_the_sign_of_the_codes_does_not_matter_where_there_is_an_offset(init):
    torch.manual_seed(0)
    x = F.gelu(torch.randn(1, 2000))
    signed, unsigned = (fitted(LSQ(4, signed=sign, offset=True, init=init), x, batched=True) for sign in (True, False))
    torch.testing.assert_close(signed(x), unsigned(x), rtol=0, atol=1e-4)  # the same grid, its codes counted otherwise


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("tokens", [17, 197])
def test_the_default_clips_little_of_attention_probabilities_at_4_bits(temperature, tokens):
    torch.manual_seed(0)
    x = (torch.randn(2000 // tokens, tokens) * temperature).softmax(-1).reshape(1, -1)
    quantizer = fitted(LSQ(4, signed=False), x, batched=True)
    clipped = (x - quantizer.step.detach() * quantizer.qmax).clamp(min=0).sum() / x.sum()
    assert clipped <= 0.01
