"""Learning rate factors, by hand."""

import pytest

from qat.training.schedules import cosine_with_warmup


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 5e-4), (4, 4.991e-4), (12, 4.921e-4), (40, 4.173e-4), (76, 2.448e-4), (100, 1.25e-4), (120, 4.77e-5)],
)
def test_the_cosine_of_the_published_runs(step, lr):
    assert 5e-4 * cosine_with_warmup(step, total=150) == pytest.approx(lr, rel=2e-3)  # as many digits as are published


def test_it_starts_at_one_and_ends_at_the_floor():
    assert cosine_with_warmup(0, 10) == 1
    assert cosine_with_warmup(5, 10) == pytest.approx(0.5)
    assert cosine_with_warmup(10, 10) == pytest.approx(0)
    assert cosine_with_warmup(10, 10, floor=0.1) == pytest.approx(0.1)
    assert cosine_with_warmup(5, 10, floor=0.1) == pytest.approx(0.55)


def test_no_step_of_the_run_is_wasted_at_the_floor():
    assert all(cosine_with_warmup(step, 100, warmup=10, floor=0.01) > 0.01 for step in range(100))


def test_the_warm_up_is_linear_and_above_zero_from_the_first_step():
    assert [cosine_with_warmup(step, 20, warmup=4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_cosine_falls_all_the_way_after_the_warm_up():
    factors = [cosine_with_warmup(step, 30, warmup=5, floor=0.1) for step in range(5, 31)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1


def test_steps_beyond_the_end_stay_at_the_floor():
    assert cosine_with_warmup(11, 10, floor=0.2) == cosine_with_warmup(1000, 10, floor=0.2) == pytest.approx(0.2)


def test_a_warm_up_as_long_as_the_run_does_not_divide_by_zero():
    assert cosine_with_warmup(3, total=3, warmup=3) == 1
    assert cosine_with_warmup(0, total=0) == 1
