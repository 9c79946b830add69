"""How far a long job is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

log = logging.getLogger(__name__)
BAR_NOTES = 1.0  # seconds between two notes beside a bar


class Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        """As text."""
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class Progress:
    """Counts units of a job and says how many per second there are and how long the rest takes.

    Args:
        unit: what is counted, for example images.
        total: how many there are.
        shown: whether this process says anything.
        seconds: between two lines where there is no terminal.
    """

    def __init__(self, unit: str, total: int, shown: bool = True, seconds: float = 15.0) -> None:
        self.unit, self.total, self.shown, self.seconds = unit, total, shown, seconds
        self.done = 0
        self._start = self._last = time.monotonic()
        self._note = ""
        terminal = shown and sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), speed_estimate_period=120) if terminal else None
        self._task = self._bar.add_task(unit, total=total) if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self.shown and self.done:
            self._say()

    def advance(self, units: int, note: Callable[[], str] | None = None) -> None:
        """Count these units as done.

        Args:
            units: how many.
            note: gives a few words about the work at present; it is called only where they are shown.
        """
        self.done += units
        due = self.shown and time.monotonic() - self._last >= (BAR_NOTES if self._bar else self.seconds)
        if due:
            self._last = time.monotonic()
            self._note = note() if note is not None else ""
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=units, description=f"{self.unit} {self._note}".strip())
        elif due:
            self._say()

    def _say(self) -> None:
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / rate))
        note = f"; {self._note}" if self._note else ""
        log.info("%s: %d of %d, %.1f per second, %s left%s", self.unit, self.done, self.total, rate, left, note)
