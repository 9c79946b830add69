"""Workers of a loader and signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import get_context

import pytest

from qat.data.worker import leave_signals_to_the_main_process, signals_held_back


def work(seconds: float) -> None:
    time.sleep(seconds)  # a worker has torch's handlers, or none, until it has its own
    leave_signals_to_the_main_process(0)
    time.sleep(0.3)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["later", "at its start"])
def test_a_worker_leaves_signals_to_the_main_process(seconds: float) -> None:
    with signals_held_back():
        worker = get_context("fork").Process(target=work, args=(seconds,), daemon=True)
        worker.start()
    time.sleep(0.15)
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid or 0, signum)
    worker.join(timeout=10)
    assert worker.exitcode == 0
