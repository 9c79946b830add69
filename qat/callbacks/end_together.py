"""Several processes of a run end together: when one fails, the others must not wait for it, and one of them says why.

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
from lightning.pytorch.trainer.states import TrainerFn

from qat.callbacks.own_signals import leave_out_handlers, requeue
from qat.runs.stop import Stopped, leave, raise_if_told

log = logging.getLogger(__name__)
PERIOD = 0.2  # seconds between two checks of the other processes
GRACE = 3.0  # seconds in which an error of another process, which may be the cause of ours, shows
LOST = ("gloo", "nccl", "connection closed", "connection reset", "socket", "store")  # words of torch for a lost process


class EndTogether(L.Callback):
    """Ends the other processes of a run when this one fails, and this one when another has failed.

    Where torchrun or SLURM has started the processes, that program ends the others; what is left is to say in one line
    that a process is gone. Of several nodes on which Lightning has started processes, each looks after its own.
    """

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[Any]] = []
        self._finished = threading.Event()
        self._way_out = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the processes that this one has started, or the one that has started it."""
        leave_out_handlers(trainer)
        self._finished.clear()
        self._take_over_children(trainer)
        self._way_out = "go on with --ckpt last" if trainer.state.fn == TrainerFn.FITTING else "run the command again"
        if self._children:
            threading.Thread(target=self._watch_children, daemon=True).start()
        elif _was_started_by_lightning(trainer):
            arguments = os.getppid(), trainer.local_rank == 1  # one of them says it
            threading.Thread(target=self._watch_parent, args=arguments, daemon=True).start()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop an evaluation whose signal came where it could not raise; `SaveLast` stops training."""
        if trainer.state.fn != TrainerFn.FITTING:
            raise_if_told()

    on_predict_batch_start = on_validation_batch_start

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the children, and leave where another process failed first: it has said why, or this one does."""
        self._take_over_children(trainer)  # the exception may have come before `setup`
        if isinstance(exception, Stopped):
            self._finished.set()
            requeue(trainer, exception.signum)
            self._end_children(GRACE if exception.saved else 0)
            return
        lost_a_peer = trainer.world_size > 1 and _is_about_a_lost_process(exception)
        code = self._failed_child(GRACE) if lost_a_peer else 0
        self._finished.set()
        self._end_children(0)
        if code:
            self._leave_after(code)
        if lost_a_peer:
            self._leave_without_a_peer(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching: processes that have finished end one after the other."""
        self._finished.set()

    def _take_over_children(self, trainer: L.Trainer) -> None:
        """Empty the list that Lightning's observer looks at, so that it has nothing to kill any more."""
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs and not self._children:
            observed, launcher.procs = launcher.procs, list(launcher.procs)
            self._children = list(observed)
            observed.clear()

    def _watch_children(self) -> None:
        while not self._finished.wait(PERIOD):
            if not (code := self._failed_child(0)):
                continue
            if code > 128 and self._finished.wait(GRACE):
                return  # all were told to stop, and this one is about to say so
            self._end_children(0)
            self._leave_after(code)

    def _failed_child(self, seconds: float) -> int:
        """The exit code of a child that has failed within so many seconds, as shells have it, or 0."""
        end = time.monotonic() + seconds
        while True:
            if failed := [child.returncode for child in self._children if child.poll()]:
                return int(failed[0] if failed[0] > 0 else 128 - failed[0])
            if time.monotonic() >= end or self._finished.wait(PERIOD):
                return 0

    def _end_children(self, patience: float) -> None:
        """Wait for the children as many seconds, then kill them: one that hangs in a collective hears nothing else."""
        end = time.monotonic() + patience
        while time.monotonic() < end and any(child.poll() is None for child in self._children):
            time.sleep(PERIOD / 10)
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()

    def _leave_after(self, code: int) -> None:
        """Leave with the exit code of a child. An error it has told itself; of a signal nobody has told yet."""
        if code > 128:
            _say(f"another process of this run was ended by signal {code - 128}: {self._way_out}")
        leave(code)

    def _leave_without_a_peer(self, trainer: L.Trainer) -> None:
        """Leave because of a process that is not a child. The launcher, or that process itself, may know more."""
        if not trainer.is_global_zero:
            time.sleep(GRACE)  # the first process ends this one, if it is there
        _say(f"the connection to another process of this run was lost, so it has ended or hangs: {self._way_out}")
        leave(1)

    def _watch_parent(self, parent: int, speaks: bool) -> None:
        while not self._finished.wait(PERIOD):
            if os.getppid() == parent:
                continue
            if speaks:
                _say(f"the first process of this run has ended before the others: {self._way_out}")
            leave(1)


def _was_started_by_lightning(trainer: L.Trainer) -> bool:
    launcher = trainer.strategy.launcher
    if trainer.local_rank == 0 or not isinstance(launcher, _SubprocessScriptLauncher):
        return False
    return isinstance(launcher.cluster_environment, LightningEnvironment)


def _is_about_a_lost_process(error: BaseException) -> bool:
    """Whether torch reports that a process with which it communicates is gone; it has no exception for that alone."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return any(word in str(error).lower() for word in LOST)


def _say(message: str) -> None:
    """One line for the user, from any thread."""
    print(f"qat: error: {message}", file=sys.stderr, flush=True)
