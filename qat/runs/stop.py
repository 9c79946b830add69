"""Being told to end by SIGTERM or Ctrl-C. Nothing here loads Lightning or torch.

A handler that works, for example saves or talks to other processes, may run in the middle of anything. So ours only
notes the signal. While a run trains, the loop looks at the note between two steps (`told`); at any other time there is
nothing to save, and the handler raises `Stopped` at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from qat.runs.process import first_process
from qat.runs.writing import remove_open_parts

AGAIN = 1.0  # seconds after which a second Ctrl-C is meant as one; a launcher may pass the first one on
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The process was told to end, or its time is over. No error: ``except Exception`` does not catch it.

    Args:
        signum: number of the signal; 0 when the time that the user has set is over.
        how: what the user has to know, after the word "stopped"; the name of the signal when empty.
        saved: every process of the run has stopped at this step and the run can be resumed from there.
    """

    def __init__(self, signum: int, how: str = "", saved: bool = False) -> None:
        super().__init__(f"stopped {how or 'by ' + signal.Signals(signum).name}")
        self.signum, self.saved = signum, saved

    @property
    def code(self) -> int:
        """Exit code as shells have it: 143 after SIGTERM, 130 after Ctrl-C, 0 after the time that was set."""
        return 128 + self.signum if self.signum else 0


@dataclass
class _Note:
    """What this process was told, and whether its work looks here."""

    owner: int = 0  # process that the handlers belong to
    signum: int = 0
    since: float = 0.0  # time.monotonic()
    deferred: bool = False


_note = _Note()


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise `Stopped`, or are only noted inside `deferred`. Handlers are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets handlers in the main thread only
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _note.owner, _note.signum, _note.deferred = os.getpid(), 0, False
    try:
        for signum in SIGNALS:
            note_signal(signum)
        yield
    finally:
        _note.owner, _note.signum = 0, 0
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is only noted, once `defer` was called: the work looks for it where it can save."""
    try:
        yield
    finally:
        _note.deferred = False


def defer() -> None:
    """From now to the end of the surrounding `deferred`, signals are only noted."""
    _note.deferred = True


def note_signal(signum: int) -> None:
    """Handle one more signal in this way."""
    signal.signal(signum, _on_signal)


def told() -> int:
    """Number of the signal that told this process to end, or 0."""
    return _note.signum


def raise_if_told(how: str = "") -> None:
    """Raise `Stopped` where a signal was noted; also one whose exception was swallowed, as in a destructor."""
    if _note.signum:
        raise Stopped(_note.signum, how)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _note.owner:
        return  # a process that was forked a moment ago, and has no handlers of its own yet
    if signum == signal.SIGINT and not first_process():
        return  # a terminal sends Ctrl-C to all processes: the first one decides
    if _note.signum:
        if signum == signal.SIGINT and time.monotonic() - _note.since > AGAIN:
            leave(128 + signum)
        return
    _note.signum, _note.since = signum, time.monotonic()
    if not _note.deferred and not _is_in_destructor(frame):
        raise Stopped(signum)


def _is_in_destructor(frame: FrameType | None) -> bool:
    """Whether Python would print an exception that is raised here, and go on; `raise_if_told` comes later."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def end_workers() -> None:
    """End the processes that load images and are left over: Python waits for them when it ends."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is killed
    for child in multiprocessing.active_children():
        child.kill()


def leave(code: int) -> None:
    """End this process at once and from any thread, whatever its main thread waits for."""
    for child in multiprocessing.active_children():  # not end_workers: handlers are set in the main thread only
        child.kill()
    remove_open_parts()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
