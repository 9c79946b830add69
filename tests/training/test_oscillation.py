"""Oscillation of codes: worked example of the specification, section 9.9."""

from __future__ import annotations

import pytest
import torch

from qat.training.oscillation import Freezable, Oscillation

CODES = [0, 0, 1, 0, 1, 1, 2, 1, 1, 0, 1]


def follow(state: Oscillation, codes: list[int]) -> list[float]:
    """The frequency after each code."""
    found = []
    for code in codes:
        state.update(torch.tensor([code], dtype=torch.int8))
        found.append(float(state.frequency))
    return found


def start(momentum: float, code: int = 0, kind: type[Oscillation] = Oscillation) -> Oscillation:
    return kind(torch.tensor([code], dtype=torch.int8), momentum)


@pytest.mark.parametrize(("momentum", "last"), [(0.01, 0.0384384449730799), (0.1, 0.27387379)])
def test_worked_example(momentum: float, last: float) -> None:
    state = start(momentum, CODES[0])
    found = follow(state, CODES[1:])
    assert int(state.total) == 4
    assert [i + 1 for i, (a, b) in enumerate(zip([0.0, *found], found, strict=False)) if b > a] == [3, 4, 7, 10]
    assert found[-1] == pytest.approx(last, rel=3e-3)  # float16 has 11 bits; a few roundings add up
    if momentum == 0.01:
        assert found[3] == pytest.approx(0.0199, rel=1e-3)


@pytest.mark.parametrize(("momentum", "needed"), [(0.01, 1), (0.001, 6)])
def test_how_many_oscillations_pass_the_threshold(momentum: float, needed: int) -> None:
    found = follow(start(momentum), [1, 0] * 6)  # the first change is no oscillation
    assert next(i for i, value in enumerate(found) if value > 0.005) == needed


def test_extremes_of_eight_bits_do_not_overflow() -> None:
    state = start(0.5, -128)
    follow(state, [127, -128])
    assert int(state.total) == 1


def test_an_unsigned_weight_freezes_at_its_code() -> None:
    """A code of 200 does not fit into int8."""
    state = Freezable(torch.tensor([200, 3], dtype=torch.uint8), 0.5)
    for code in (201, 200, 201, 200):
        state.update(torch.tensor([code, 3], dtype=torch.uint8))
    # the mean of the first: 200.5, 200.25, 200.625, 200.3125
    assert state.mean.tolist() == [200.3125, 3.0]
    assert state.direction.tolist() == [1, 0]  # from 201 down to 200
    state.freeze(threshold=0.3)
    assert state.frozen.tolist() == [True, False]
    assert state.codes.tolist() == [200, 3]
    assert (state.codes.dtype, state.direction.dtype) == (torch.uint8, torch.int8)


def test_states_of_older_checkpoints_load() -> None:
    """Unsigned codes and their directions were int16 there, and frozen codes above 127 had wrapped around."""
    state = Freezable(torch.tensor([0, 0], dtype=torch.uint8), 0.5)
    old = {"codes": torch.tensor([-56, 199], dtype=torch.int16), "direction": torch.tensor([-1, 1], dtype=torch.int16)}
    state.load_state_dict(old)
    assert state.codes.tolist() == [200, 199]
    assert state.direction.tolist() == [-1, 1]
    assert (state.codes.dtype, state.direction.dtype) == (torch.uint8, torch.int8)


def test_a_state_resumes_in_another_object() -> None:
    whole, first = start(0.1, 0, Freezable), start(0.1, 0, Freezable)
    follow(whole, [1, 0, 1, 2])
    follow(first, [1, 0])
    second = start(0.1, 0, Freezable)
    second.load_state_dict(first.state_dict())
    follow(second, [1, 2])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_frozen_weight_stays_at_its_mean_code() -> None:
    state = start(0.5, 3, Freezable)
    assert isinstance(state, Freezable)
    follow(state, [4, 3, 3, 3, 4])
    state.freeze(threshold=0.4)
    assert bool(state.frozen)
    assert int(state.codes) == 4 or int(state.codes) == 3
    held = int(state.codes)
    assert held == round(float(state.mean))
    follow(state, [7, -8])
    assert int(state.codes) == held


@pytest.mark.parametrize("momentum", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("period", [1, 2, 10])
def test_a_long_run_agrees_with_the_exact_frequency(momentum: float, period: int) -> None:
    """A weight that flips every ``period`` updates: its frequency tends to 1 / period."""
    state, exact, code = start(momentum), 0.0, 0
    for update in range(1, 6001):
        flips = update % period == 0
        code = 1 - code if flips else code
        exact = momentum * (flips and update > period) + (1 - momentum) * exact
        state.update(torch.tensor([code], dtype=torch.int8))
    assert float(state.frequency) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(("first", "then"), [(5, 6), (-8, -7), (64, 65), (100, 103)])
def test_the_mean_code_arrives(first: int, then: int) -> None:
    state = start(0.001, first, Freezable)
    follow(state, [then] * 12000)
    state.freeze(-1.0)
    assert int(state.codes) == then
