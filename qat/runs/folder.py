"""The folder of a run, RUNS/NAME/DATE, and checkpoints in it that survive a killed process."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qat.errors import QatError

LAST = "last.ckpt"
CALIBRATED = "ptq.ckpt"


def fresh_folder(parent: Path) -> Path:
    """A new folder named by date and time; runs that start in the same second get a number."""
    date = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            (parent / (date + suffix)).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise QatError(f"--runs: cannot create {parent / date}: {error.strerror}") from None
        return parent / (date + suffix)
    raise QatError(f"--runs: {parent} has 99 runs that were started in this second")


def last_folder(parent: Path) -> Path:
    """The newest run below ``parent``; QatError if there is none, or if it has no last.ckpt to resume from.

    A folder without a config does not count: its command was refused before training started.
    """
    folders = sorted(path.parent for path in parent.glob("*/config.yaml"))
    if not folders:
        raise QatError(f"--ckpt last: no run in {parent} to resume; leave --ckpt out to start")
    if not (folders[-1] / LAST).is_file():
        raise QatError(
            f"--ckpt last: the newest run, {folders[-1]}, ended before its first {LAST}; leave --ckpt out to start "
            "again, or give the checkpoint of an older run as --ckpt FILE"
        )
    return folders[-1]


def config_name(folder: Path) -> str:
    """config.yaml for the first start of a run, config_2.yaml when it is resumed, and so forth."""
    names = ("config.yaml", *(f"config_{n}.yaml" for n in range(2, 10_000)))
    return next(name for name in names if not (folder / name).exists())


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a new checkpoint beside the old one and then replaces it, so that there is always a complete one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write, flush to the disk, rename."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
