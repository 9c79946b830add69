"""Processes agree on what one of them wants; here they are threads with a store of their own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from torch.distributed import TCPStore

from qat.callbacks.agreement import Agreement


def test_one_process_is_asked_at_once() -> None:
    agreement = Agreement()
    agreement.connect(0, 1)
    assert [agreement.ask(wanted) for wanted in (0, 15)] == [0, 15]
    assert agreement.common(7) == 7


def test_all_get_the_same_answer_one_boundary_later(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    agreements = [Agreement() for _ in range(3)]
    for rank, agreement in enumerate(agreements):
        monkeypatch.setattr(Agreement, "_connections", count(5))  # as in a process of its own
        agreement.connect(rank, 3)

    def work(rank: int) -> list[int]:
        answers = [agreements[rank].common(10 + rank)]
        for boundary in range(12):
            time.sleep(0.001 * rank * (boundary % 3))  # some are late
            answers.append(agreements[rank].ask(15 if (rank, boundary) == (2, 8) else 0))
        return answers

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [[10, *[0] * 9, 15, 0, 0]] * 3
    assert server.num_keys() < 20  # counters are used again


def test_processes_that_torchrun_starts_again_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store, which torchrun keeps, still has what the processes before wanted."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        agreements = [Agreement() for _ in range(2)]
        for rank, agreement in enumerate(agreements):
            monkeypatch.setattr(Agreement, "_connections", count())
            agreement.connect(rank, 2)
        for agreement in agreements:
            assert agreement.ask(0 if attempt else 15) == 0
        assert [agreement.ask(0) for agreement in agreements] == [0 if attempt else 15] * 2
