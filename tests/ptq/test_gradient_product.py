"""The Hessian-guided choice of both operands of a product: the worked example, and every form against plain code."""

import pytest
import torch
from torch import Tensor

from qat.ptq.gradient_product import QUICK, GradientProduct, Side
from qat.ptq.hessian_search import multiples
from qat.ptq.product_search import Operand
from qat.quantizers import Layout, TwinSoftmax, Uniform
from qat.quantizers.uniform import UniformQuantizer
from qat.sites.insert import FloatSite
from qat.sites.products import same

STEPS = Uniform(4, signed=True, zero="none")
W = torch.tensor([[0.9, -0.35, 0.12], [-0.48, 0.27, 0.66]], dtype=torch.float64)
X = torch.tensor([[1, -2, 0.5], [0.3, 0.8, -1.2], [-0.7, 0.1, 2.4], [1.9, -0.6, -0.2]], dtype=torch.float64)
G = torch.tensor([[0.5, 0.1], [0.2, -0.4], [-0.1, 0.3], [0.8, 0.05]], dtype=torch.float64)


def side(x: Tensor, layout: Layout, axis: int | None, matrix=same, count: int = 100) -> Side:
    quantizer = STEPS.build(layout)
    rows = quantizer.grouped(x)
    low, high = rows.amin(1).float(), rows.amax(1).float()
    quantizer.set_range_(low, high)
    return Side(Operand(quantizer, [x], matrix, axis), multiples(quantizer, low, high, count, 0.01, 1.2))


def layer(x: Tensor, weight: Tensor, g: Tensor, groups: int = 1, count: int = 100) -> GradientProduct:
    left = side(x, Layout(0, 1, batched=True), None, count=count)
    return GradientProduct(left, side(weight, Layout(0, groups, batched=False), 0, count=count), [g], weight=True)


def chosen(product: GradientProduct) -> tuple[int, int]:
    """Which multiples of the full range the weight and the input have."""
    sides = (product.right, product.left)
    return tuple(int((s.table["step"][:, 0] == s.operand.site.step).nonzero()[0]) for s in sides)


def test_the_worked_example():
    """Indices are exact. Steps are float32, which moves the score in its seventh digit."""
    product = layer(X, W, G)
    assert product.right.operand.site.step.item() == pytest.approx(0.12)
    assert product.left.operand.site.step.item() == pytest.approx(0.32)
    for rounds in (1, 3):
        product.search_(rounds)
        assert chosen(product) == (88, 96)
    assert product.right.operand.site.step.item() == pytest.approx(0.126864, abs=1e-7)
    assert product.left.operand.site.step.item() == pytest.approx(0.368768, abs=1e-7)
    table = {name: values[96:97] for name, values in product.left.table.items()}
    assert product.scores(False, table).item() == pytest.approx(3.0215544e-4, rel=1e-5)


def test_without_gradients_the_squared_error_decides():
    product = layer(X, W, torch.ones_like(G))
    product.search_(3)
    assert chosen(product) == (86, 95)


def test_the_first_of_equal_candidates_is_chosen():
    product = layer(X, W, torch.zeros_like(G))
    product.search_(3)
    assert chosen(product) == (0, 0)


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("form", ["layer", "heads"])
def test_scores_are_those_of_plain_code(form, right):
    """In float32, sums in another order differ in the sixth digit."""
    torch.manual_seed(0)
    if form == "layer":
        product, groups = layer(torch.randn(700, 24), torch.randn(36, 24), torch.randn(700, 36), 3), 3 if right else 1
    else:
        layout, q, k = Layout(1, 3, batched=True), torch.randn(20, 3, 7, 8), torch.randn(20, 3, 9, 8)
        gradients = torch.randn(20, 3, 7, 9)
        product, groups = GradientProduct(side(q, layout, 1), side(k, layout, 1), [gradients], weight=False), 3
    tried, other = (product.right, product.left) if right else (product.left, product.right)
    found = product.scores(right, tried.table)
    assert found.shape == (100, groups)
    for k in (3, 50, 99):
        quantizer = tried.operand.site
        quantizer.set_({name: values[k] for name, values in tried.table.items()})
        a, b = quantizer(tried.operand.tensors[0]), other.operand.site(other.operand.tensors[0])
        exact = tried.operand.tensors[0] @ other.operand.tensors[0].mT
        errors = ((a @ b.mT - exact) * (product.gradients[0].mT if right else product.gradients[0])).square()
        axis = 0 if form == "layer" else 1
        sums = errors.movedim(axis, 0).reshape(groups, -1).sum(1) if groups > 1 else errors.sum()[None]
        torch.testing.assert_close(found[k].float(), sums / errors.numel(), rtol=1e-5, atol=0)


def test_the_first_decision_on_a_part_of_the_samples_finds_almost_the_best():
    """Where a few samples have most of the gradient, as the class token has."""
    torch.manual_seed(0)
    x, weight = torch.randn(64 * QUICK, 24), torch.randn(12, 24)
    g = torch.randn(64 * QUICK, 12) * torch.logspace(0, -3, 64 * QUICK)[:, None]
    quick, full = layer(x, weight, g), layer(x, weight, g)
    full._quick = lambda: None
    found = []
    for product in (quick, full):
        product.search_(3)
        table = {name: getattr(product.left.operand.site, name).detach()[None] for name in product.left.table}
        found.append(product.scores(False, table).item())
    assert found[0] <= 1.01 * found[1]


def test_a_split_is_chosen_with_values_in_floating_point():
    torch.manual_seed(0)
    probs, v = torch.randn(4, 2, 6, 6).mul(3).softmax(-1), torch.randn(4, 2, 6, 8)
    splits = TwinSoftmax(4).build(Layout(1, 1, batched=True))
    splits.init_from(probs.reshape(1, -1))
    space = splits.search_space(probs.reshape(1, -1))
    left = Side(Operand(splits, [probs], same, 1), space.parameters(space.first), alone=True)
    coarse = Uniform(2, signed=True, zero="none").build(Layout(1, 1, batched=True))
    coarse.set_range_(torch.tensor([-1e-3]), torch.tensor([1e-3]))
    g = torch.randn(4, 2, 6, 8)
    found = []
    for site in (coarse, FloatSite()):
        right = Side(Operand(site, [v], lambda x: x.mT, 1))
        found.append(GradientProduct(left, right, [g], weight=False).scores(False, left.table))
    assert torch.equal(*found)
    assert isinstance(coarse, UniformQuantizer)
