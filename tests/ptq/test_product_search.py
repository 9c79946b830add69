"""The search for ranges by the error of a matrix product. Shapes: n rows, O other rows, I columns, K candidates."""

import pytest
import torch
from torch import Tensor, nn

from qat.ptq.product_search import (
    Operand,
    ProductSearch,
    by_group,
    candidate_ranges,
    candidate_table,
    improve_,
    row_errors,
    searchable,
    tried_values,
)
from qat.quantizers import LSQ, PTF, BitLog2, LogSqrt2, Quantizer, Uniform
from qat.quantizers.spec import Layout, Spec, Table
from qat.sites.insert import FloatSite

TENSOR = Layout(0, 1, batched=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(x: Tensor) -> Tensor:
    return x


def started(spec: Spec, layout: Layout, low: float, high: float) -> Quantizer:
    quantizer = spec.build(layout)
    quantizer.set_range_(torch.full((layout.groups,), low), torch.full((layout.groups,), high))
    return quantizer


def table(quantizer: Quantizer, *ends: tuple[float, float]) -> Table:
    """The same candidates for one group."""
    low, high = torch.tensor(ends, dtype=torch.float32).T[..., None]
    return quantizer.from_range(low, high)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("others", [2, 9])  # below and above I: two ways to compute the same
def test_the_error_of_rows_is_that_of_the_product(batch, others):
    X, M = random(*batch, 5, 4), random(*batch, others, 4, seed=1)
    Y, D = random(*batch, 5, others, seed=2), random(6, *batch, 5, 4, seed=3)
    expected = ((X + D) @ M.mT - Y).square().sum(-1)
    torch.testing.assert_close(row_errors(X, M, Y)(D), expected, rtol=1e-12, atol=1e-12)


def test_the_error_of_many_images_is_that_of_their_gram_matrix():
    weight, x = random(3, 4), random(500, 4, seed=1)  # each row of the weight is an output channel
    D = 1e-6 * random(2, 3, 4, seed=2)  # far smaller than the weight: nothing cancels
    torch.testing.assert_close(
        row_errors(weight, x, weight @ x.mT)(D), (D @ x.mT).square().sum(-1), rtol=1e-10, atol=0.0
    )


def test_rows_are_summed_over_what_shares_a_step():
    errors = torch.arange(12.0).reshape(2, 6)
    assert by_group(errors, Layout(0, 3, False), 0).tolist() == [[1, 5, 9], [13, 17, 21]]
    assert by_group(errors, Layout(0, 1, False), 0).tolist() == [[15], [51]]
    assert by_group(errors, Layout(1, 6, False), 0).tolist() == [[15], [51]], "columns have no errors of their own"
    heads = torch.arange(8.0).reshape(1, 2, 2, 2)  # candidates, images, heads, tokens
    assert by_group(heads, Layout(1, 2, True), 1).tolist() == [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7]]


@pytest.mark.parametrize("layout", [(0, 1), (0, 3), (1, 2), (-1, 8), (-1, 4)])
def test_values_with_a_tried_range_are_those_of_the_quantizer_with_it(layout):
    for spec in (LSQ(3, signed=False, offset=True), Uniform(3), Uniform(3, True, zero="none")):
        check_values_with_tried_ranges(spec, Layout(*layout, batched=True))


def check_values_with_tried_ranges(spec: Spec, layout: Layout) -> None:
    x = random(6, 4, 8).float()
    low, high = -random(5, layout.groups).float().abs(), random(5, layout.groups, seed=1).float().abs()
    trial = spec.build(layout)
    values = tried_values(trial, x, trial.from_range(low, high))
    for i in range(5):
        quantizer = spec.build(layout)
        quantizer.set_range_(low[i], high[i])
        assert torch.equal(values[i], quantizer(x))


def test_a_range_with_a_zero_point_moves_by_whole_steps():
    samples = torch.linspace(0, 15, 1501)[None]
    low, high = candidate_ranges(Uniform(4), samples)
    assert low.shape == high.shape == (128, 1)
    assert (high - low).view(8, 16)[-1].allclose(torch.tensor(15.0)), "the widest is that of all samples"
    assert low.view(8, 16)[-1].allclose(torch.arange(-8.0, 8.0))
    assert (high - low).view(8, 16)[0].allclose(torch.tensor(12.0)), "the narrowest, from the quantile 0.1 to 0.9"
    assert low.view(8, 16)[0, 8].item() == pytest.approx(1.5)
    assert candidate_ranges(LSQ(2, signed=False, offset=True), samples)[0].view(32, 4).shape == (32, 4), (
        "no more than codes"
    )


@pytest.mark.parametrize("spec", [LSQ(4), Uniform(4, True, zero="none"), LogSqrt2(4)], ids=repr)
def test_a_range_without_a_zero_point_shrinks_by_a_ratio(spec):
    low, high = candidate_ranges(spec, torch.tensor([[-2.0, 0.0, 4.0]]))
    assert (low[0].item(), high[0].item()) == (-2, 4)
    assert high[-1].item() == pytest.approx(4 / 64)
    ratios = high[1:] / high[:-1]
    assert ratios.allclose(ratios[0])
    assert (low * -2).allclose(high)


def test_a_site_without_a_range_is_not_searched():
    assert all(searchable(spec.build(TENSOR)) for spec in (Uniform(4), LSQ(4), LogSqrt2(4)))
    sites = [FloatSite(), BitLog2(4).build(TENSOR), PTF(4).build(Layout(-1, 4, batched=True))]
    assert not any(searchable(site) for site in sites)


def test_values_that_the_product_does_not_read_are_clipped():
    x = torch.tensor([[0.0, 900.0], [1.0, 600.0], [2.0, 0.0], [3.0, 300.0]])
    quantizer = started(LSQ(2, signed=False), TENSOR, 0, 900)
    product = ProductSearch(
        Operand(quantizer, [x], same, None, table(quantizer, (0, 900), (0, 3), (0, 1.5))),
        Operand(FloatSite(), [torch.tensor([[1.0, 0.0]])], same, 0),
        rows=4,
    )
    assert product.error() > 1
    product.search_(3)
    assert quantizer.step.item() == 1
    assert product.error() == 0


def test_the_zero_point_with_the_least_error_is_found():
    x = torch.tensor([[10.0], [11.0], [12.0], [13.0]])
    quantizer = started(Uniform(2), TENSOR, 0, 13)
    moved = [(9.0 + i, 12.0 + i) for i in range(3)]
    improve_(Operand(quantizer, [x], same, None, table(quantizer, *moved)), [torch.ones(1, 1)], [x])
    assert (quantizer.step.item(), quantizer.zero_point.item()) == (1, -10)
    assert torch.equal(quantizer(x), x)


def test_every_output_channel_gets_its_own_range():
    weight = torch.tensor([[0.0, 1.0, 900.0], [0.0, 300.0, 900.0]])
    quantizer = started(LSQ(2, signed=False, granularity="channel"), Layout(0, 2, batched=False), 0, 900)
    low = torch.zeros(2, 2)
    high = torch.tensor([[900.0, 900.0], [3.0, 3.0]])
    x = torch.tensor([[1.0, 1.0, 0.0]])  # the third input is always zero
    improve_(Operand(quantizer, [weight], same, 0, quantizer.from_range(low, high)), [x], [weight @ x.mT])
    assert quantizer.step.tolist() == [1, 300]


def test_groups_without_errors_of_their_own_take_the_same_candidate():
    x = torch.tensor([[1.0, 10.0]])
    quantizer = started(LSQ(2, signed=False, granularity="channel"), Layout(-1, 2, batched=True), 0, 900)
    low, high = torch.zeros(3, 2), torch.tensor([[3.0, 900.0], [30.0, 30.0], [60.0, 3.0]])
    improve_(Operand(quantizer, [x], same, None, quantizer.from_range(low, high)), [torch.eye(2)], [x])
    assert quantizer.step.tolist() == [10, 10]  # (1, 300) and (20, 1) leave more, though (1, 10) would leave none


def test_a_quantizer_stays_where_no_candidate_is_better():
    x = random(8, 4).float()
    quantizer = LSQ(4).build(TENSOR)
    quantizer.init_from(x.reshape(1, -1))
    before = quantizer.step.clone()
    improve_(Operand(quantizer, [x], same, None, table(quantizer, (-100, 100), (-50, 50))), [torch.eye(4)], [x])
    assert torch.equal(quantizer.step, before)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("spec", [LSQ(3), LSQ(3, signed=False, offset=True), Uniform(3)], ids=repr)
def test_the_error_never_grows(spec, rows):
    """Also where a few rows decide, and are not like the others."""
    x, weight = random(100, 6).float() ** 3, random(5, 6, seed=1).float()
    left, right = spec.build(TENSOR), spec.build(Layout(0, 5, batched=False))
    left.init_from(x.reshape(1, -1))
    right.init_from(weight)
    product = ProductSearch(
        Operand(left, [x], same, None, candidate_table(left, x.reshape(1, -1))),
        Operand(right, [weight], same, 0, candidate_table(right, weight)),
        rows,
    )
    before = product.error()
    product.search_(3)
    assert product.error() < before if rows == 100 else product.error() <= before


def test_a_site_in_floating_point_is_an_operand_without_error():
    x = random(8, 4).float()
    sides = [Operand(nn.Identity(), [x], same, None), Operand(FloatSite(), [x], same, 0)]
    product = ProductSearch(*sides, rows=8)
    product.search_(3)
    assert product.error() == 0
