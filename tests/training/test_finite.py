"""Losses that are not finite stop a run and name the place."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from qat.errors import QatError
from qat.training.finite import Copy, FiniteCheck


class FakeEvent:
    """An event of a GPU that has happened, or will when somebody waits for it."""

    def __init__(self, happened: bool) -> None:
        self.happened, self.waited = happened, False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = self.waited = True


class FakeLoss:
    """A loss on a GPU."""

    is_cuda = True

    def detach(self) -> FakeLoss:
        return self

    def to(self, device: str, non_blocking: bool) -> torch.Tensor:
        assert (device, non_blocking) == ("cpu", True)
        return torch.tensor(1.0)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    """The events that a check on a GPU records."""
    recorded: list[FakeEvent] = []

    class Recorded(FakeEvent):
        def record(self) -> None:
            recorded.append(self)

    monkeypatch.setattr(torch.cuda, "Event", lambda: Recorded(happened=False))
    return recorded


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_names_the_place_and_the_way_out(value: str) -> None:
    check = FiniteCheck()
    check.check(torch.tensor(1.0), "step 6")
    with pytest.raises(QatError, match=rf"loss is {value} at step 7 .*model\.lr"):
        check.check(torch.tensor(float(value)), "step 7 (epoch 0)")


def test_a_check_on_a_gpu_waits_for_nothing(events: list[FakeEvent]) -> None:
    check = FiniteCheck()
    for step in range(5):
        check.check(cast(torch.Tensor, FakeLoss()), f"step {step}")
    assert len(check.copies) == 5  # none has arrived
    events[0].happened = events[1].happened = True
    check.check(cast(torch.Tensor, FakeLoss()), "step 5")
    assert [copy.place for copy in check.copies] == ["step 2", "step 3", "step 4", "step 5"]
    assert not any(event.waited for event in events)


def test_a_bad_loss_is_found_when_it_arrives(events: list[FakeEvent]) -> None:
    check = FiniteCheck()
    check.copies.append(Copy(torch.tensor(torch.nan), cast(torch.cuda.Event, FakeEvent(happened=True)), "step 3"))
    with pytest.raises(QatError, match="nan at step 3"):
        check.check(cast(torch.Tensor, FakeLoss()), "step 4")


def test_the_end_of_training_waits_for_the_rest() -> None:
    check, places = FiniteCheck(), ("step 8", "step 9")
    for place, loss in zip(places, (1.0, torch.inf), strict=True):
        check.copies.append(Copy(torch.tensor(loss), cast(torch.cuda.Event, FakeEvent(happened=False)), place))
    with pytest.raises(QatError, match="inf at step 9"):
        check.wait()
    assert not check.copies
