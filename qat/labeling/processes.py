"""The processes that make one store: they wait for each other, and they end together."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from qat.errors import QatError
from qat.runs.stop import raise_if_told

PERIOD = 0.05  # seconds between two looks at the others
GRACE = 3.0  # seconds in which the exit code of a process shows that has closed its connection
PATIENCE = 30.0  # seconds that a process has to write its labels
KEPT = "labels made so far are kept; run the same command again to go on"


class Processes:
    """Those of one command: this one, and those that it has started or was started by.

    Args:
        fabric: launched; this takes over the watch of the children, which Lightning would end by killing this process.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._parent = os.getppid()
        self._children: list[subprocess.Popen[Any]] = []
        launcher = fabric.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            observed, launcher.procs = launcher.procs, []
            self._children = list(observed)
            observed.clear()  # Lightning's thread looks at this list

    def check(self) -> None:
        """Go on only while all is well.

        Raises:
            Stopped: this process was told to end.
            QatError: another process has ended.
            SystemExit: the same, and it has said why.
        """
        raise_if_told()
        for child in self._children:
            if child.poll() == 2:
                raise SystemExit(2)
            if child.returncode:
                raise QatError(f"another process of this command has ended with code {child.returncode}; {KEPT}")
        if (
            self._fabric.global_rank and os.getppid() != self._parent
        ):  # on Windows the number stays: end orphans by hand
            raise QatError(f"the process that started this one has ended; {KEPT}")

    def wait_for_all(self) -> None:
        """Wait until every process has come here; raises what `check` does."""
        if self._fabric.world_size == 1:
            return
        arrived = dist.barrier(async_op=True)  # a blocking one could not be interrupted
        try:
            while not arrived.is_completed():
                self.check()
                time.sleep(PERIOD)
            arrived.wait()
        except RuntimeError:
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                self.check()
                time.sleep(PERIOD)
            raise QatError(f"the connection to another process of this command is lost; {KEPT}") from None

    def end(self) -> None:
        """End the children; they write the labels that they have made."""
        for child in self._children:
            child.terminate()
        for child in self._children:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
