"""The curriculum: the worked example, and which images have a turn."""

import pytest
import torch

from qat.ptq.reconstruction.curriculum import Curriculum, Ranking


@pytest.mark.parametrize(
    ("t", "count"), [(0, 512), (1, 513), (1500, 640), (3000, 768), (4500, 896), (5999, 1024), (6000, 1024)]
)
def test_how_many_images_take_part(t, count):
    assert Curriculum().count(t, 6000, 1024) == count


@pytest.mark.parametrize("start", [0.1, 0.3, 0.7])
def test_a_share_that_floats_cannot_hold_gives_the_exact_count(start):
    assert Curriculum(start=start).count(0, 10, 1000) == round(1000 * start)


LOSSES = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4])


@pytest.mark.parametrize(
    ("t", "images"),
    [(0, {1, 3, 5, 7}), (1500, {1, 2, 3, 5, 7}), (3000, {1, 2, 3, 4, 5, 7}), (6000, set(range(8)))],
)
def test_the_easiest_images_come_first(t, images):
    ranking = Ranking(Curriculum(refresh=0), 6000, torch.arange(8), lambda picks: LOSSES[picks])
    ranking.at(0)
    assert set(ranking.at(t).tolist()) == images


def test_the_order_of_equal_losses_is_that_of_the_images():
    ranking = Ranking(Curriculum(), 10, torch.tensor([4, 2, 7, 1]), lambda picks: torch.zeros(len(picks)))
    assert ranking.at(0).tolist() == [4, 2]


def test_images_are_ranked_again():
    losses = [LOSSES, -LOSSES]
    ranking = Ranking(Curriculum(refresh=2), 4, torch.arange(8), lambda picks: losses.pop(0)[picks])
    assert set(ranking.at(0).tolist()) == {1, 3, 5, 7}
    assert 0 not in ranking.at(1)
    assert ranking.at(2).tolist() == [0, 6, 4, 2, 7, 3]
