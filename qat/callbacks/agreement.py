"""Processes that train together agree on the step at which all of them stop, without waiting for a device."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from itertools import count
from typing import Any

from torch import distributed

PATIENCE = timedelta(minutes=30)  # with a process that is late; one that has ended is noticed by `EndTogether`
SLOTS = 4  # a counter is used again when no process can still be reading it: they are at most one boundary apart
WANTED = 2**32  # what a process adds to the counter beside its 1 when it wants something


class Agreement:
    """What some process wants, known to all processes at the same step.

    At every boundary between two steps each process is counted, and reads whether somebody wanted something at the
    boundary before. So nobody waits for the slowest process at this boundary, and all act on the same answer at one
    boundary. The counters lie in the store by which torch connects the processes, two short messages to the first
    process. A GPU is neither asked nor waited for. A collective of gloo in the background would do as well, but its
    thread may hold a lock of Python in the moment in which the workers of a loader are forked; they would hang.
    """

    _connections = count()

    def __init__(self) -> None:
        self._store: Any = None
        self._rank, self._processes, self._round, self._counted = 0, 1, 0, 0

    def connect(self, rank: int, processes: int) -> None:
        """Connect to the store; every process calls it. One process needs none."""
        self._rank, self._processes, self._round, self._counted = rank, processes, 0, 0
        if processes > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            options: dict[str, Any] = {"is_master": False, "timeout": PATIENCE, "wait_for_workers": False}
            store = distributed.TCPStore(address, port, **options)  # type: ignore[attr-defined]
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store when it starts again
            prefix = f"qat/{attempt}/{next(self._connections)}"
            self._store = distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]

    def ask(self, wanted: int) -> int:
        """Say what this process wants, or 0; return what was wanted one boundary ago, or now where it is alone.

        Raises:
            RuntimeError: another process has not come to the boundary before.
        """
        if self._store is None:
            return wanted
        now, self._round = self._round, self._round + 1
        if wanted:
            self._store.set(f"wanted/{now}", str(wanted))
        self._store.add(f"here/{now % SLOTS}", 1 + (WANTED if wanted else 0))
        if not now or self._wait_for_all(now - 1) < WANTED:
            return 0
        return int(self._store.get(f"wanted/{now - 1}"))

    def common(self, boundaries: int) -> int:
        """The smallest number of boundaries that any process will pass."""
        if self._store is None:
            return boundaries
        place, self._counted = f"boundaries/{self._counted}", self._counted + 1
        self._store.set(f"{place}/{self._rank}", str(boundaries))
        return min(int(self._store.get(f"{place}/{rank}")) for rank in range(self._processes))

    def _wait_for_all(self, boundary: int) -> int:
        """The counter of a boundary, once every process was there."""
        everybody = self._processes * (boundary // SLOTS + 1)
        end = time.monotonic() + PATIENCE.total_seconds()
        while (counter := int(self._store.add(f"here/{boundary % SLOTS}", 0))) % WANTED < everybody:
            if time.monotonic() > end:
                raise RuntimeError("connection to another process of this run lost: it does not come to its next step")
            time.sleep(0.001)
        return counter
