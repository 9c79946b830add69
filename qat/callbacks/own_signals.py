"""Signals of a training run: Lightning's handlers, which save and broadcast in the middle of anything, are left out."""

from __future__ import annotations

import logging
import os
import subprocess

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from qat.runs import stop

log = logging.getLogger(__name__)


def leave_out_handlers(trainer: L.Trainer) -> None:
    """Keep Lightning from handling SIGTERM, and from asking all processes about it in every step.

    Under SLURM, the signal that asks for another start of the job is noted like any other; see `requeue`.

    Raises:
        RuntimeError: this version of Lightning does it in another way.
    """
    connector, loop = getattr(trainer, "_signal_connector", None), trainer.fit_loop.epoch_loop
    if not hasattr(connector, "register_signal_handlers") or not hasattr(loop, "_broadcast_sigterm_tensor"):
        raise RuntimeError("this version of lightning handles signals in another way; install lightning<2.7")
    setattr(connector, "register_signal_handlers", lambda: None)  # noqa: B010
    setattr(loop, "_broadcast_sigterm_tensor", lambda: None)  # noqa: B010
    if signum := _requeue_signal(trainer):
        stop.note_signal(signum)


def requeue(trainer: L.Trainer, signum: int) -> None:
    """Ask SLURM to start the job again, if that is what the signal was for. The first process does it."""
    if signum and signum == _requeue_signal(trainer) and trainer.is_global_zero:
        job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        name = f"{job}_{task}" if job and task else os.environ["SLURM_JOB_ID"]
        try:
            subprocess.run(["scontrol", "requeue", name], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("SLURM does not start job %s again: %s", name, error)


def _requeue_signal(trainer: L.Trainer) -> int:
    """The signal by which SLURM asks for another start, SIGUSR1 unless told otherwise; 0 elsewhere."""
    environment = getattr(getattr(trainer, "_accelerator_connector", None), "cluster_environment", None)
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return 0
    return int(environment.requeue_signal or 0)
