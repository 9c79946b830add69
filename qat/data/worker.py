"""Processes that load images: how they start, and that they leave it to the main process when to end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from torch import distributed

PATIENCE = 20  # seconds
LONGEST_STEP = 600  # seconds
SETTLED = 0.1  # seconds
HELD_BACK = (signal.SIGINT, signal.SIGTERM)


def leave_signals_to_the_main_process(worker: int) -> None:
    """Set the handlers of a worker of a loader.

    A terminal sends Ctrl-C to all processes of a command, and a batch system SIGTERM: the main process then takes its
    step to the end, which may take long, saves and ends its workers. It sends SIGTERM too, to workers that do not end
    by themselves. So the second SIGTERM ends a worker after a while, and so does the first one where the main process
    is gone; else the first one ends it after the longest step that is thinkable.
    """
    parent, told = os.getppid(), count(1)

    def end_if_it_hangs(*_: object) -> None:
        signal.alarm(PATIENCE if next(told) > 1 or os.getppid() != parent else LONGEST_STEP)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, end_if_it_hangs)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Inside, signals wait, also in the workers that are started, until they have handlers of their own."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_other_threads_finish() -> None:
    """Wait a moment before workers are forked, where several processes train.

    Lightning compares the lengths of loaders over all processes right before. The thread of gloo that has done so then
    gives its tensors back to Python, for which it takes a lock of the interpreter. A worker that is forked in that very
    moment would find the lock taken by a thread that it does not have, and wait for ever.
    """
    if distributed.is_available() and distributed.is_initialized():
        time.sleep(SETTLED)
