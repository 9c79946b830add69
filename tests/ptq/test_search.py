"""Searches for a range, against the numbers of the papers and against a loop."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from qat.ptq import search
from qat.ptq.search import best_range, calibrate_, calibrate_by_percentiles_, percentiles, range_errors, shrunk
from qat.quantizers import LSQ, IntegerNorm, LogIntSoftmax, LogSqrt2, Quantizer, Uniform, UniformQuantizer
from qat.quantizers.spec import Layout, Spec


def build(spec: Spec, groups: int = 1) -> Quantizer:
    return spec.build(Layout(0, groups, batched=False))


def draw(groups: int, n: int) -> Tensor:
    return torch.randn(groups, n, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Refined(Uniform):
    """A kind that finds something from samples after its range."""

    def build(self, layout: Layout) -> Quantizer:
        return RefinedQuantizer(self, layout)


class RefinedQuantizer(UniformQuantizer):
    refines = True

    def refine_(self, samples: Tensor) -> None:
        self.refined_on = samples


class Rangeless(UniformQuantizer):
    ranged = False

    def init_from(self, samples: Tensor) -> None:
        self.started_from = samples


def test_repq_scale_search_of_the_square_root_of_two():
    probs = torch.exp2(-torch.arange(1000) / 100)[None]
    quantizer = build(LogSqrt2(4, zero="extra"))
    low, high = percentiles(probs)
    torch.testing.assert_close(high[:, 0], torch.tensor([0.9930994030, 0.9993099403, 0.9999309940]))
    expected = torch.tensor([7.1072e-4, 7.3259e-4, 7.3510e-4], dtype=torch.float64)
    torch.testing.assert_close(range_errors(quantizer, probs, low, high)[:, 0], expected, rtol=1e-4, atol=0)
    calibrate_by_percentiles_(quantizer, probs)
    assert quantizer.step.item() == pytest.approx(0.9930994030)


def test_repq_initialization_of_a_tensor():
    quantizer = build(Uniform(4))
    calibrate_by_percentiles_(quantizer, torch.arange(-200, 801)[None] / 100)
    assert quantizer.step.item() == pytest.approx(0.6653333333)
    assert quantizer.zero_point.item() == 3


def test_repq_initialization_per_channel_has_a_negative_zero_point():
    channels = torch.stack([torch.linspace(*ends, 500) for ends in [(-1, 1), (-4, 12), (0.5, 2.5)]])
    quantizer = build(Uniform(4), 3)
    calibrate_by_percentiles_(quantizer, channels)
    torch.testing.assert_close(quantizer.step.data, torch.tensor([0.1330666667, 1.0645333333, 0.1330666667]))
    assert quantizer.zero_point.tolist() == [8, 4, -4]


def test_repq_initialization_of_weight_rows():
    rows = torch.tensor([[0.5, -1, 0.25, 0.75], [0.1, 0.2, -0.05, 0.4]])
    quantizer = build(Uniform(4), 2)
    calibrate_by_percentiles_(quantizer, rows)
    torch.testing.assert_close(quantizer.step.data, torch.tensor([0.1166636667, 0.0299993]))
    assert quantizer.zero_point.tolist() == [9, 2]
    expected = [[0.4666547, -1.0499730, 0.2333273, 0.6999820], [0.0899979, 0.2099951, -0.0599986, 0.3899909]]
    torch.testing.assert_close(quantizer(rows).detach(), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [Uniform(3), Uniform(4, zero="fractional"), LSQ(4), LSQ(4, False, offset=True)])
@pytest.mark.parametrize("block", [1, 20_000, 2**20])
def test_errors_are_those_of_one_candidate_after_the_other(monkeypatch, spec, block):
    monkeypatch.setitem(search.BLOCK, "cpu", block)
    for groups, power in product((1, 5), (2.0, 2.4)):
        x, quantizer = draw(groups, 3000), build(spec, groups)
        low, high = shrunk(x.amin(1), x.amax(1), (1.0, 0.7, 0.4, 0.1))
        found = range_errors(quantizer, x, low, high, power)
        assert not quantizer.calibrated
        for i in range(4):
            quantizer.set_range_(low[i], high[i])
            expected = (quantizer(x).detach() - x).abs().double().pow(power).mean(1)
            torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=0)


def test_the_first_of_equal_candidates_wins():
    x = draw(2, 5000)
    low, high = shrunk(x.amin(1), x.amax(1), (0.3, 0.8, 0.8, 0.9))
    high = high + torch.tensor([0, 0, 1e-30, 0])[:, None]  # the same numbers
    found = range_errors(build(Uniform(4), 2), x, low, high)
    assert torch.equal(found[1], found[2])
    assert found[:, 0].argmin() == 1


def test_each_group_has_its_own_range():
    x = draw(3, 4000)
    x[1, 0] = 20  # an outlier worth clipping
    x[2] *= 1e-3
    low, high = shrunk(x.amin(1), x.amax(1), search.OMSE_FACTORS)
    best = best_range(build(LSQ(3), 3), x, low, high)
    for group in range(3):
        column = slice(group, group + 1)
        alone = best_range(build(LSQ(3)), x[column], low[:, column], high[:, column])
        assert best[0][group] == alone[0]
        assert best[1][group] == alone[1]
    assert best[1][1] < 5


def test_a_candidate_with_nan_is_never_best():
    x = draw(1, 100)
    low, high = x.amin(1)[None].repeat(2, 1), torch.stack([x.amax(1) * torch.nan, x.amax(1)])
    assert best_range(build(Uniform(4)), x, low, high)[1] == x.amax()


def test_factors_are_those_of_the_papers():
    assert search.OMSE_FACTORS[0] == search.BRECQ_FACTORS[0] == 1
    assert (len(search.OMSE_FACTORS), len(search.BRECQ_FACTORS)) == (90, 80)
    assert search.OMSE_FACTORS[-1] == pytest.approx(0.11)
    assert search.BRECQ_FACTORS[-1] == pytest.approx(0.21)
    low, high = shrunk(torch.tensor([-2.0, 0.0]), torch.tensor([4.0, 1.0]), (1.0, 0.5))
    assert low.tolist() == [[-2, 0], [-1, 0]]
    assert high.tolist() == [[4, 1], [2, 0.5]]


@pytest.mark.parametrize("spec", [IntegerNorm(8, zero="clipped"), LogIntSoftmax(4)])
def test_arithmetic_on_integers_is_fitted_by_the_uniform_grid_of_its_range(spec):
    x = draw(1, 5000)
    quantizer, expected = build(spec), build(Uniform(8, zero="clipped" if isinstance(spec, IntegerNorm) else "integer"))
    for each in (quantizer, expected):
        calibrate_(each, x, lambda samples: shrunk(samples.amin(1), samples.amax(1), search.OMSE_FACTORS))
    torch.testing.assert_close(quantizer.step.data, expected.step.data)
    assert quantizer.zero_point == expected.zero_point


def test_without_a_search_the_range_is_full():
    x = draw(3, 50)
    quantizer, expected = build(Uniform(4), 3), build(Uniform(4), 3)
    calibrate_(quantizer, x)
    expected.set_range_(x.amin(1), x.amax(1))
    assert torch.equal(quantizer.step, expected.step)


def test_a_kind_that_refines_itself_keeps_the_full_range():
    x = draw(1, 1000)
    quantizer = build(Refined(4))
    calibrate_by_percentiles_(quantizer, x)
    assert quantizer.step.item() == pytest.approx((x.amax() - x.amin()).item() / 15)
    assert quantizer.refined_on is x


def test_a_kind_without_a_range_starts_from_the_samples():
    x = draw(1, 10)
    quantizer = Rangeless(Uniform(4), Layout(0, 1, batched=False))
    calibrate_by_percentiles_(quantizer, x)
    assert quantizer.started_from is x
