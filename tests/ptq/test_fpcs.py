"""The search from coarse to fine: minima that are known. Shapes: K points, G groups that share a step."""

import pytest
import torch
from torch import Tensor

from qat.ptq.fpcs import KEPT, best_parameters, space_of
from qat.ptq.range_space import RangeSpace
from qat.quantizers import LSQ, PTF, AdaLog, BitLog2, Layout, LogSqrt2, Uniform
from qat.quantizers.candidates import TableSpace
from qat.quantizers.space import Table

TENSOR = Layout(0, 1, batched=True)


def draw(groups: int = 2, n: int = 3000) -> Tensor:
    return torch.randn(groups, n, generator=torch.Generator().manual_seed(0))


def scales(groups: int = 2) -> RangeSpace:
    """Steps of a signed quantizer of two bits, in a geometric series."""
    quantizer = LSQ(2).build(Layout(0, groups, batched=True))
    space = space_of(quantizer, draw(groups))
    assert isinstance(space, RangeSpace)
    return space


def test_a_known_minimum_is_found_and_every_refinement_comes_closer():
    """The error is (log(step / s))**2; the grid alone misses s by up to half of its spacing."""
    space = scales()
    steps = space.parameters(space.first)["step"]
    goal = steps[40] * torch.tensor([1.008, 0.987])

    def errors(table: Table) -> Tensor:
        return (table["step"] / goal).log().square()

    spacing, missed = space.first["spacing"][0, 0].item(), []
    for levels in range(6):
        found = best_parameters(space, errors, levels=levels)
        assert found.least.tolist() == errors({"step": found.row["step"][None]})[0].tolist()
        missed.append(found.least.sqrt().max().item())
    assert missed == sorted(missed, reverse=True)
    # Eight points around a kept one lie spacing / 7 apart, and the next spacing is that / 7.5; five times.
    assert missed[1] <= spacing / 14
    assert missed[5] < 1e-6  # 2e-6 apart, and float32 steps are not finer


@pytest.mark.parametrize("levels", [0, 1, 5])
def test_it_is_never_worse_than_the_grid(levels):
    """Errors with many local minima, of groups that differ."""
    space = scales(3)
    errors = lambda table: (table["step"] * torch.tensor([900.0, 777, 555])).sin()  # noqa: E731
    grid = errors(space.parameters(space.first)).amin(0)
    found = best_parameters(space, errors, levels=levels)
    assert (found.least <= grid).all()
    assert torch.equal(found.least, errors({"step": found.row["step"][None]})[0])


def test_groups_that_cannot_be_told_apart_go_together():
    space = scales()
    steps = space.parameters(space.first)["step"]
    together = lambda table: (table["step"] / steps[30]).log().square().sum(1, keepdim=True)  # noqa: E731
    found = best_parameters(space, together)
    assert found.least.shape == (1,)
    places = found.row["step"] / steps[0]
    assert places[0].item() == pytest.approx(places[1].item(), rel=1e-6)  # both at one place of their grids


def test_the_last_points_are_decided_by_all_the_evidence():
    """A quick estimate that prefers its neighbour; the points that are kept have both."""
    table = {"step": torch.arange(1.0, 41)[:, None]}
    seen: list[int] = []

    def errors(found: Table) -> Tensor:
        seen.append(len(found["step"]))
        return (found["step"] - 7).abs()

    found = best_parameters(TableSpace(table), errors, lambda found: (found["step"] - 9).abs())
    assert found.row["step"].item() == 7
    assert len(seen) == 1
    assert 1 < seen[0] <= KEPT
    assert found.points["step"].flatten()[:2].tolist() in ([7, 6], [7, 8])


def test_another_search_starts_from_the_points_of_the_first():
    space = scales()
    goal = space.parameters(space.first)["step"][20]
    first = best_parameters(space, lambda table: (table["step"] / goal).log().square(), levels=0)
    moved = best_parameters(space, lambda t: (t["step"] / goal / 1.01).log().square(), levels=2, start=first.points)
    assert moved.row["step"].allclose(goal * 1.01, rtol=1e-3)


def test_a_candidate_that_is_not_finite_is_never_best():
    table = {"step": torch.tensor([[torch.nan], [2.0], [3.0]])}
    assert best_parameters(TableSpace(table), lambda found: found["step"]).row["step"].item() == 2


def test_what_is_tried_depends_on_the_quantizer():
    values = draw(1).abs()
    for spec in (Uniform(4), LSQ(4), LogSqrt2(4)):
        assert isinstance(space_of(spec.build(TENSOR), values), RangeSpace)
    for spec in (AdaLog(4), AdaLog(4, shifted=True), BitLog2(4)):
        quantizer = spec.build(TENSOR)
        quantizer.init_from(values / values.max())
        space = space_of(quantizer, values / values.max())
        assert not isinstance(space, RangeSpace)
    assert space_of(PTF(4).build(Layout(-1, 4, batched=True)), draw(4)) is None
