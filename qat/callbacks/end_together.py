"""Several processes that Lightning has started end together: when one fails, the others must not wait for it.

Under NCCL a process waits in a collective for as long as it takes, so nothing else would end it. Lightning's own
observer looks at the children every five seconds and then kills the first process too, before it can report an error.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

log = logging.getLogger(__name__)
PERIOD = 0.2  # seconds between two checks of the other processes
GRACE = 3.0  # seconds in which an error of another process, which may be the cause of ours, shows


class EndTogether(L.Callback):
    """Ends the other processes of a run when this one fails, and this one when another has failed.

    It does nothing where there is one process, or where another program (torchrun, SLURM) has started them all: that
    program ends them. Of several nodes that Lightning has started by hand, each looks after its own processes only.
    """

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[Any]] = []
        self._finished = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the processes that this one has started, or the one that has started it."""
        self._finished.clear()
        self._take_over_children(trainer)
        launcher = trainer.strategy.launcher
        if self._children:
            threading.Thread(target=self._watch_children, daemon=True).start()
        elif trainer.local_rank > 0 and isinstance(launcher, _SubprocessScriptLauncher):
            if not isinstance(launcher.cluster_environment, LightningEnvironment):
                return  # torchrun or SLURM
            threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True).start()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the children; where one of them failed first, its message has been printed: leave with its exit code."""
        self._take_over_children(trainer)  # the exception may have come before `setup`
        if not self._children:
            return
        lost_a_peer = isinstance(exception, RuntimeError) and not isinstance(exception, torch.OutOfMemoryError)
        code = self._failed_child(GRACE) if lost_a_peer else 0
        self._finished.set()
        self._kill_children()
        if code:
            _leave(code)

    def _take_over_children(self, trainer: L.Trainer) -> None:
        """Empty the list that Lightning's observer looks at, so that it has nothing to kill any more.

        Lightning's handler of signals gets a list of its own: it passes them on to the children.
        """
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs and not self._children:
            observed, launcher.procs = launcher.procs, list(launcher.procs)
            self._children = list(observed)
            observed.clear()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching: processes that have finished end one after the other."""
        self._finished.set()

    def _watch_children(self) -> None:
        while not self._finished.wait(PERIOD):
            if code := self._failed_child(0):
                self._kill_children()
                _leave(code)

    def _failed_child(self, seconds: float) -> int:
        """The exit code of a child that has failed within so many seconds, or 0."""
        end = time.monotonic() + seconds
        while True:
            if failed := [child.returncode for child in self._children if child.poll()]:
                return int(abs(failed[0]))
            if time.monotonic() >= end or self._finished.wait(PERIOD):
                return 0

    def _kill_children(self) -> None:
        for child in self._children:
            child.kill()  # SIGTERM does not reach a process that hangs in a collective
        for child in self._children:
            child.wait()

    def _watch_parent(self, parent: int) -> None:
        while not self._finished.wait(PERIOD):
            if os.getppid() != parent:
                _leave(1)


def _leave(code: int) -> None:
    """End this process from any thread, whatever its main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
