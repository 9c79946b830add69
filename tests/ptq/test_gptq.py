"""GPTQ and GPTAQ: against a slow form that inverts every trailing block, and on grids of real quantizers."""

import pytest
import torch
from torch import Tensor

from qat.ptq import gptq as module
from qat.ptq.gptq import Grid, gptq
from qat.quantizers import LSQ, Layout, Quantizer, Uniform

O, I = 24, 20  # noqa: E741
LAYOUTS = {"tensor": Layout(0, 1, False), "channel": Layout(0, O, False), "rows": Layout(0, 3, False)}
LAYOUTS |= {"columns": Layout(-1, 4, False), "columns_from_the_front": Layout(1, 4, False)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight() -> Tensor:
    return torch.randn(O, I, generator=seeded(3))


def inputs(n: int = 300, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Correlated rows (n, I), and the same with drift that the inputs share, as a quantized prefix leaves it."""
    x = torch.randn(n, I, generator=seeded(seed)) @ torch.randn(I, I, generator=seeded(7)) + 0.5
    return x, x + x @ torch.randn(I, I, generator=seeded(8)) * 0.03


def quantizer(spec: LSQ | Uniform, layout: Layout = LAYOUTS["channel"]) -> Quantizer:
    found = spec.build(layout)
    found.init_from(found.grouped(weight()))
    return found


def grid(bits: int = 3) -> Grid:
    affine = quantizer(LSQ(bits, granularity="channel")).affine()
    assert affine is not None
    return Grid.of(affine, weight())


def gram_of(q: Tensor) -> Tensor:
    return q.double().T @ q.double()


def slow(w: Tensor, grid: Grid, x: Tensor, q: Tensor, damping: float, alpha: float) -> Tensor:
    """Every column in turn; the answer of those that are left by least squares, with an inverse of its own."""
    x, q = x.double(), q.double()
    H, D = q.T @ q, (x - q).T @ q
    order = H.diagonal().argsort(descending=True).tolist()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H)).double()
    left, values = w.double().clone(), torch.zeros_like(w)
    for place, i in enumerate(order):
        values[:, i] = grid.rounded(left[:, i].float(), i)
        rest = order[place + 1 :]
        inverse = torch.linalg.inv(H[rest][:, rest])
        lost = left[:, i, None] - values[:, i, None].double()
        left[:, rest] += lost * (H[i, rest] @ inverse) + alpha * left[:, i, None] * (D[i, rest] @ inverse)
    return values


def error(w: Tensor, values: Tensor, x: Tensor, q: Tensor) -> float:
    return float((x @ w.T - q @ values.T).square().mean())


def nearest(w: Tensor, grid: Grid) -> Tensor:
    return torch.stack([grid.rounded(w[:, i], i) for i in range(w.shape[1])], 1)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_give_the_codes_of_the_slow_form(monkeypatch, block, alpha):
    monkeypatch.setattr(module, "BLOCK", block)
    x, q = inputs()
    cross = q.double().T @ (x - q).double()
    found = gptq(weight(), grid(), gram_of(q), 0.1, cross, alpha)
    assert torch.equal(found, slow(weight(), grid(), x, q, 0.1, alpha))
    if not alpha:
        assert torch.equal(found, gptq(weight(), grid(), gram_of(q), 0.1))
        assert torch.equal(found, gptq(weight(), grid(), gram_of(q), 0.1, torch.zeros_like(cross)))


def test_independent_inputs_are_rounded_to_the_nearest():
    assert torch.equal(gptq(weight(), grid(), torch.eye(I).double(), 0.01), nearest(weight(), grid()))
    levels = torch.diag(torch.rand(I, generator=seeded(5)) + 1).double()
    assert torch.equal(gptq(weight(), grid(), levels, 0.01), nearest(weight(), grid()))


def test_two_columns_by_hand():
    """With the gram [[2, 1], [1, 1]], an error e in the first input is best answered by e in the second."""
    step = Grid(torch.ones(1, 2), torch.zeros(1, 2), -4, 3)
    gram = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    assert gptq(torch.tensor([[0.4, 0.3]]), step, gram, 0.0).tolist() == [[0, 1]]  # 0.3 + 0.4
    assert gptq(torch.tensor([[0.3, 0.4]]), step, gram.flip(0, 1), 0.0).tolist() == [[1, 0]]  # the second comes first


def test_outputs_come_closer_and_gptaq_follows_the_input_of_the_float_model():
    x, q = inputs()
    cross = q.double().T @ (x - q).double()
    w, points = weight(), grid()
    plain, asymmetric = gptq(w, points, gram_of(q), 0.01), gptq(w, points, gram_of(q), 0.01, cross, alpha=1.0)
    assert error(w, plain, q, q) < 0.7 * error(w, nearest(w, points), q, q)
    assert error(w, asymmetric, x, q) < 0.8 * error(w, plain, x, q) < 0.8 * error(w, nearest(w, points), x, q)


def test_a_dead_input_is_rounded_and_changes_no_other():
    _, q = inputs()
    q[:, 4] = 0
    found = gptq(weight(), grid(), gram_of(q), 0.1)
    assert torch.equal(found[:, 4], grid().rounded(weight()[:, 4], 4))
    other = weight()
    other[:, 4] += 100
    kept = [i for i in range(I) if i != 4]
    assert torch.equal(gptq(other, grid(), gram_of(q), 0.1)[:, kept], found[:, kept])
    assert torch.equal(gptq(weight(), grid(), torch.zeros(I, I).double(), 0.1), nearest(weight(), grid()))


def test_the_order_of_inputs_does_not_matter():
    _, q = inputs()
    order = torch.randperm(I, generator=seeded(9))
    found = gptq(weight()[:, order], grid(), gram_of(q[:, order]), 0.1)
    assert torch.equal(found, gptq(weight(), grid(), gram_of(q), 0.1)[:, order])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", [LSQ(3), LSQ(8), Uniform(3), Uniform(4, signed=True, zero="none")], ids=repr)
def test_the_quantizer_of_the_layer_leaves_the_values_as_they_are(spec, layout):
    site = quantizer(spec, layout)
    affine = site.affine()
    assert affine is not None
    points = Grid.of(affine, weight())
    assert points.step.shape == weight().shape
    assert torch.equal(nearest(weight() * 1.3, points), site(weight() * 1.3)), "clipped entries too"
    found = gptq(weight(), points, gram_of(inputs()[1]), 0.1)
    assert torch.equal(site(found), found)
    assert torch.equal(site.decode(site.encode(found)), found)
    assert found.dtype == torch.float32
