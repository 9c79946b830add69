"""The search for ranges by the error of a matrix product. Shapes: n rows, O other rows, I columns, K candidates."""

import pytest
import torch
from torch import Tensor, nn

from qat.ptq.fpcs import space_of
from qat.ptq.product_search import (
    Operand,
    OperandErrors,
    ProductSearch,
    by_group,
    improve_,
    row_errors,
    tried_values,
)
from qat.quantizers import LSQ, BitLog2, Layout, Quantizer, Uniform
from qat.quantizers.candidates import TableSpace
from qat.quantizers.spec import Spec
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


def tried(quantizer: Quantizer, *ends: tuple[float, float]) -> TableSpace:
    """A few ranges, for one group."""
    low, high = torch.tensor(ends, dtype=torch.float32).T[..., None]
    return TableSpace(quantizer.from_range(low, high))


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


def test_values_that_the_product_does_not_read_are_clipped():
    x = torch.tensor([[0.0, 900.0], [1.0, 600.0], [2.0, 0.0], [3.0, 300.0]])
    quantizer = started(LSQ(2, signed=False), TENSOR, 0, 900)
    product = ProductSearch(
        Operand(quantizer, [x], same, None, tried(quantizer, (0, 900), (0, 3), (0, 1.5))),
        Operand(FloatSite(), [torch.tensor([[1.0, 0.0]])], same, 0),
    )
    assert product.error() > 1
    product.search_(3)
    assert quantizer.step.item() == 1
    assert product.error() == 0


def test_the_zero_point_with_the_least_error_is_found():
    x = torch.tensor([[10.0], [11.0], [12.0], [13.0]])
    quantizer = started(Uniform(2), TENSOR, 0, 13)
    moved = [(9.0 + i, 12.0 + i) for i in range(3)]
    improve_(Operand(quantizer, [x], same, None, tried(quantizer, *moved)), [torch.ones(1, 1)], [x])
    assert (quantizer.step.item(), quantizer.zero_point.item()) == (1, -10)
    assert torch.equal(quantizer(x), x)


def test_every_output_channel_gets_its_own_range():
    weight = torch.tensor([[0.0, 1.0, 900.0], [0.0, 300.0, 900.0]])
    quantizer = started(LSQ(2, signed=False, granularity="channel"), Layout(0, 2, batched=False), 0, 900)
    low = torch.zeros(2, 2)
    high = torch.tensor([[900.0, 900.0], [3.0, 3.0]])
    x = torch.tensor([[1.0, 1.0, 0.0]])  # the third input is always zero
    space = TableSpace(quantizer.from_range(low, high))
    improve_(Operand(quantizer, [weight], same, 0, space), [x], [weight @ x.mT])
    assert quantizer.step.tolist() == [1, 300]


def test_groups_without_errors_of_their_own_take_the_same_candidate():
    x = torch.tensor([[1.0, 10.0]])
    quantizer = started(LSQ(2, signed=False, granularity="channel"), Layout(-1, 2, batched=True), 0, 900)
    low, high = torch.zeros(3, 2), torch.tensor([[3.0, 900.0], [30.0, 30.0], [60.0, 3.0]])
    space = TableSpace(quantizer.from_range(low, high))
    improve_(Operand(quantizer, [x], same, None, space), [torch.eye(2)], [x])
    assert quantizer.step.tolist() == [10, 10]  # (1, 300) and (20, 1) leave more, though (1, 10) would leave none


def test_a_quantizer_stays_where_no_candidate_is_better():
    x = random(8, 4).float()
    quantizer = LSQ(4).build(TENSOR)
    quantizer.init_from(x.reshape(1, -1))
    before = quantizer.step.clone()
    improve_(Operand(quantizer, [x], same, None, tried(quantizer, (-100, 100), (-50, 50))), [torch.eye(4)], [x])
    assert torch.equal(quantizer.step, before)


@pytest.mark.parametrize("levels", [0, 5])
@pytest.mark.parametrize("n", [1, 100])
@pytest.mark.parametrize("spec", [LSQ(3), LSQ(3, signed=False, offset=True), Uniform(3), BitLog2(3)], ids=repr)
def test_the_error_never_grows(spec, n, levels):
    """Also where the first decisions are made on a part of the rows, which are not like the others."""
    x, weight = random(n, 6).float() ** 3, random(5, 6, seed=1).float()
    left, right = spec.build(TENSOR), Uniform(3).build(Layout(0, 5, batched=False))
    x = x.abs() if isinstance(spec, BitLog2) else x
    left.init_from(x.reshape(1, -1))
    right.init_from(weight)
    product = ProductSearch(
        Operand(left, [x], same, None, space_of(left, x.reshape(1, -1))),
        Operand(right, [weight], same, 0, space_of(right, weight)),
        levels,
    )
    errors = [product.error()]
    for _ in range(3):
        product.search_(1)
        errors.append(product.error())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_rows_count_as_often_as_their_roots_say():
    """A row that counts 4 times is that row 4 times, for targets, errors and the choice."""
    x, weight = random(6, 3).float(), random(4, 3, seed=1).float()
    counts = torch.tensor([1, 4, 1, 9, 1, 2])
    found = []
    for rows, roots in ((x, [counts[:, None].float().sqrt()]), (x.repeat_interleave(counts, 0), None)):
        left, right = Uniform(2).build(TENSOR), Uniform(2).build(Layout(0, 4, batched=False))
        left.init_from(x.reshape(1, -1))
        right.init_from(weight)
        operand = Operand(left, [rows], same, None, space_of(left, x.reshape(1, -1)), roots=roots)
        product = ProductSearch(operand, Operand(right, [weight], same, 0, space_of(right, weight)))
        sums = [product.error() * product.targets[0].numel()]
        errors = OperandErrors(operand, product.right.values(), product.targets)
        sums += errors(left.from_range(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[1.0], [3.0]])))[:, 0].tolist()
        product.search_(2)
        found.append((sums, [left.step.item(), *right.step.tolist()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)  # sums of float32 in another order
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)  # the last points lie closer than float32 tells apart


def test_a_site_in_floating_point_is_an_operand_without_error():
    x = random(8, 4).float()
    sides = [Operand(nn.Identity(), [x], same, None), Operand(FloatSite(), [x], same, 0)]
    product = ProductSearch(*sides)
    product.search_(3)
    assert product.error() == 0
