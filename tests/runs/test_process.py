"""What a process knows about itself."""

from __future__ import annotations

import sys

import pytest

from qat.runs.process import RANK_VARIABLES, first_process, keep_freed_memory


def test_the_first_process_is_known_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert first_process()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not first_process()
    monkeypatch.setenv("RANK", "0")  # comes first
    assert first_process()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert keep_freed_memory() is False
