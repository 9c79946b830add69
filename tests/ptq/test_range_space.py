"""The ranges that a search tries, worked out by hand. Shapes: K points, G groups that share a step."""

import pytest
import torch

from qat.ptq.range_space import CANDIDATES, NARROWEST, SHRINK, SPAWNED, RangeSpace, candidate_ranges
from qat.quantizers import LSQ, Layout, LogSqrt2, Uniform


def test_ranges_with_a_zero_point_have_geometric_widths_and_move_by_whole_steps():
    samples = torch.linspace(0, 15, 1501)[None]
    low, high, spacing = candidate_ranges(Uniform(4), samples)
    assert low.shape == high.shape == spacing.shape == (CANDIDATES, 1)
    width = (high - low).view(8, 16)
    assert width[-1].allclose(torch.tensor(15.0)), "the widest is that of all samples"
    assert width[0].allclose(torch.tensor(12.0)), "the narrowest, from the quantile 0.1 to 0.9"
    ratios = width[1:] / width[:-1]
    assert ratios.allclose(torch.tensor((15 / 12) ** (1 / 7)))
    assert spacing.exp().allclose(ratios[0, 0])
    assert low.view(8, 16)[-1].allclose(torch.arange(-8.0, 8.0))
    assert low.view(8, 16)[0, 8].item() == pytest.approx(1.5)
    assert candidate_ranges(LSQ(2, signed=False, offset=True), samples)[0].view(32, 4).shape == (32, 4), (
        "no more shifts than codes"
    )


@pytest.mark.parametrize("spec", [LSQ(4), Uniform(4, True, zero="none"), LogSqrt2(4)], ids=repr)
def test_a_range_without_a_zero_point_shrinks_by_a_ratio(spec):
    low, high, spacing = candidate_ranges(spec, torch.tensor([[-2.0, 0.0, 4.0]]))
    assert {(low[i].item(), high[i].item()) for i in (0, -1)} == {(-2, 4), (-2 * NARROWEST, 4 * NARROWEST)}
    wide = high.sort(0, descending=True).values
    assert (wide[1:] / wide[:-1]).log().allclose(-spacing[1:])
    assert (low * -2).allclose(high)


@pytest.mark.parametrize("samples", [[0.0] * 100 + [7.0], [3.0] * 100, [0.0] * 100, [-5.0, *[0.0] * 99]])
def test_a_tail_and_a_constant_have_finite_ranges_in_order(samples):
    """Half of the quantiles are one value here; the narrowest range is still a part of the full one."""
    low, high, spacing = candidate_ranges(Uniform(4), torch.tensor([samples]))
    assert torch.cat([low, high, spacing]).isfinite().all()
    assert (high >= low).all()
    assert (spacing > 0).all()


def test_finer_ranges_lie_around_the_kept_ones_and_closer_each_time():
    quantizer = Uniform(4).build(Layout(0, 2, batched=True))
    ends = torch.tensor([[-1.0, 2.0]]), torch.tensor([[3.0, 8.0]]), torch.tensor([[0.2, 0.4]])
    space = RangeSpace(quantizer, *ends)
    near = space.near(space.first)
    assert near["low"].shape == (SPAWNED, 2)
    factor = near["high"] / ends[1]
    assert factor.log()[[0, -1]].allclose(torch.tensor([[-0.1, -0.2], [0.1, 0.2]]))  # half of the spacing
    assert near["low"].allclose(ends[0] * factor), "scaled about zero"
    assert near["spacing"].allclose(ends[2] / SHRINK)
    again = space.near({name: rows[:1] for name, rows in near.items()})
    assert (again["high"][-1] / near["high"][0]).log().allclose(torch.tensor([0.2, 0.4]) / SHRINK / 2)


def test_points_become_the_parameters_of_their_ranges():
    quantizer = Uniform(2).build(Layout(0, 2, batched=True))
    low, high = torch.tensor([[0.0, -3.0]]), torch.tensor([[3.0, 3.0]])
    found = RangeSpace(quantizer, low, high, torch.ones(1, 2)).parameters({"low": low, "high": high})
    assert {name: rows.tolist() for name, rows in found.items()} == {"step": [[1, 2]], "zero_point": [[0, 2]]}
