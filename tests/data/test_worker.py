"""Workers of a loader and signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import get_context

import pytest

from qat.data import worker
from qat.data.worker import leave_signals_to_the_main_process, signals_held_back


def work(seconds: float) -> None:
    time.sleep(seconds)  # a worker has torch's handlers, or none, until it has its own
    leave_signals_to_the_main_process(0)
    time.sleep(0.3)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["later", "at its start"])
def test_a_worker_leaves_signals_to_the_main_process(seconds: float) -> None:
    with signals_held_back():
        process = get_context("fork").Process(target=work, args=(seconds,), daemon=True)
        process.start()
    time.sleep(0.15)
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid or 0, signum)
    process.join(timeout=10)
    assert process.exitcode == 0


def take_a_long_step() -> None:
    worker.PATIENCE = 1
    leave_signals_to_the_main_process(0)
    time.sleep(30)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_the_second_sigterm_ends_a_worker_that_hangs() -> None:
    """The first one may come from a batch system, while the main process is in a long step."""
    with signals_held_back():
        process = get_context("fork").Process(target=take_a_long_step, daemon=True)
        process.start()
    process.terminate()
    process.join(timeout=1.5)
    assert process.exitcode is None
    process.terminate()
    process.join(timeout=10)
    assert process.exitcode == -signal.SIGALRM
