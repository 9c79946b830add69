"""Processes that load images leave it to the main process when to end."""

from __future__ import annotations

import signal

PATIENCE = 20  # seconds


def leave_signals_to_the_main_process(worker: int) -> None:
    """Set the handlers of a worker of a loader.

    A terminal sends Ctrl-C to all processes of a command, and a batch system SIGTERM: the main process then takes its
    step to the end, saves and ends its workers. SIGTERM still ends a worker that hangs, after a while, because the main
    process sends it too, to those that do not end by themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(PATIENCE))
