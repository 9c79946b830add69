"""Oscillation-aware bin regularization: worked examples of the specification, section 9.7, and the exact numpy form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat.quantizers import LSQ, LSQQuantizer
from qat.quantizers.spec import Layout
from qat.sites.insert import WeightSite
from qat.training.regularizers import BinRegularizer, bins

W = [[-0.52, -0.27, -0.06, 0.03], [0.12, 0.24, 0.31, 0.55], [-0.21, 0.08, -0.33, 0.19]]


def site(weight: Tensor, step: list[float], bits: int, layout: Layout | None = None, **options: object) -> WeightSite:
    """A weight with a calibrated quantizer, in the precision of ``weight``."""
    quantizer = LSQQuantizer(LSQ(bits=bits, grad_scale="l1", **options), layout or Layout(0, len(step), batched=False))
    quantizer = quantizer.to(weight.dtype)
    with torch.no_grad():
        quantizer.step.copy_(torch.tensor(step, dtype=weight.dtype))
        if quantizer.offset is not None:
            quantizer.offset.fill_(0.03)
    return WeightSite("fc.weight_quant", nn.Parameter(weight), quantizer)


def exact(
    w: np.ndarray, s: float, offset: float, qmin: int, qmax: int, scale: float
) -> tuple[float, np.ndarray, float]:
    """R, dR/dw and the raw dR/ds of one group, as section 3.2 writes them, with a loop over the bins."""
    v = (w - offset) / s
    clipped = np.clip(v, qmin, qmax)
    k = np.round(clipped)
    w_c, w_q = s * clipped + offset, s * k + offset
    value = scale * ((w_q - w_c) ** 2).sum()
    d_c = np.zeros_like(w)
    for j in range(qmin, qmax + 1):
        members = k == j
        if members.sum() > 1:
            value += w_c[members].var(ddof=1)
            d_c[members] = 2 * (w_c[members] - w_c[members].mean()) / (members.sum() - 1)
    inside = (v >= qmin) & (v <= qmax)
    return value, np.where(inside, 2 * scale * (w_c - w_q) + d_c, 0), (d_c * clipped * ~inside).sum()


@pytest.mark.parametrize(
    ("bits", "mean_form", "sum_form", "d_w", "d_s"),
    [
        (
            2, 0.0127783333, 0.0378033333,
            [[0, -0.0716667, -0.0866667, 0.0183333], [-0.0443333, 0, 0, 0],
             [0.0583333, 0.0766667, 0.0816667, 0.0023333]],
            0.0978971,
        ),
        (
            3, 0.0142916667, 0.0563666667,
            [[0.0133333, -0.0716667, -0.0866667, 0.0183333], [-0.0766667, 0.0633333, -0.015, -0.0083333],
             [0.0583333, 0.0766667, 0.0116667, 0.005]],
            0.0,
        ),
    ],
)  # fmt: skip
def test_worked_example(bits: int, mean_form: float, sum_form: float, d_w: list[list[float]], d_s: float) -> None:
    chosen = site(torch.tensor(W, dtype=torch.float64), [0.2], bits)
    assert BinRegularizer(reduction="sum").penalty([chosen]).item() == pytest.approx(sum_form, abs=1e-10)
    penalty = BinRegularizer(reduction="mean").penalty([chosen])
    penalty.backward()
    assert penalty.item() == pytest.approx(mean_form, abs=1e-10)  # the digits that are printed
    assert torch.allclose(chosen.weight.grad, torch.tensor(d_w, dtype=torch.float64), atol=5e-8)
    assert float(chosen.quantizer.step.grad) == pytest.approx(d_s, abs=5e-8)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis", "groups"), [((6, 128), 0, 1), ((6, 40), 0, 3), ((6, 40), 0, 6), ((5, 8), -1, 4)]
)
def test_equals_the_exact_form(shape: tuple[int, int], axis: int, groups: int, offset: bool, reduction: str) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    steps = [0.1 + 0.05 * g for g in range(groups)]
    chosen = site(weight, steps, 3, Layout(axis, groups, batched=False), offset=offset)
    penalty = BinRegularizer(reduction=reduction).penalty([chosen])
    (3 * penalty).backward()
    rows = chosen.quantizer.grouped(weight).numpy()
    grads = chosen.quantizer.grouped(chosen.weight.grad).numpy()
    shift = 0.03 if offset else 0.0
    scale = 1.0 if reduction == "sum" else 1 / weight.numel()  # the mean runs over the weight, not over a group
    per_group = [exact(row, s, shift, -4, 3, scale) for row, s in zip(rows, steps, strict=True)]
    assert penalty.item() == pytest.approx(sum(value for value, _, _ in per_group), rel=1e-10)
    gains = chosen.quantizer.gain(weight)
    gains = chosen.quantizer.grouped(gains.expand_as(weight))[:, 0] if groups > 1 else gains
    for grad, (_, wanted, _) in zip(grads, per_group, strict=True):
        np.testing.assert_allclose(grad, 3 * wanted, rtol=1e-10, atol=1e-12)
    wanted_steps = torch.tensor([3 * ds for _, _, ds in per_group], dtype=torch.float64) * torch.as_tensor(gains)
    assert torch.allclose(chosen.quantizer.step.grad, wanted_steps, rtol=1e-9, atol=1e-12)


def test_float32_agrees_with_float64() -> None:
    """A variance computed as sum of squares minus squared sum would be lost here: 1e-10 beside 0.0036."""
    weight = 0.06 + 1e-5 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    grads = []
    for dtype in (torch.float32, torch.float64):
        chosen = site(weight.to(dtype), [0.2], 3)
        BinRegularizer(reduction="mean").penalty([chosen]).backward()
        centre = 2 * chosen.weight.detach() / weight.numel()  # all weights are in bin 0
        grads.append((chosen.weight.grad - centre).double())
    assert torch.allclose(grads[0], grads[1], atol=1e-11)  # 2 (w - mean) / 4095 is 5e-9; float32 resolves 0.06 to 4e-9


def test_portions_that_fit_into_the_cache_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have the same length in every portion, so that the sums over a bin are the same to the bit."""
    torch.manual_seed(0)
    sites = [site(torch.randn(shape) * 0.3, [0.1, 0.2], 3) for shape in ((6, 96), (8, 40), (4, 64))]
    grads = []
    for limit in (10_000, 1):
        monkeypatch.setattr(bins, "CACHED", limit)
        for chosen in sites:
            chosen.weight.grad = chosen.quantizer.step.grad = None
        penalty = BinRegularizer().penalty(sites)
        penalty.backward()
        grads.append([(chosen.weight.grad, chosen.quantizer.step.grad) for chosen in sites])
    for together, alone in zip(*grads, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
