"""The folder of a run, RUNS/NAME/DATE: where it is, its metrics and checkpoints, which survive a killed process."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from qat.errors import QatError

LAST = "last.ckpt"


def first_process() -> bool:
    """Whether this is the only process, or the first of several: the one that writes."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


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
    raise QatError(f"--runs: {parent} has a hundred runs of this second")


def last_folder(parent: Path) -> Path:
    """The newest folder below ``parent`` that has a last.ckpt; QatError if there is none."""
    found = sorted(path.parent for path in parent.glob(f"*/{LAST}"))
    if not found:
        raise QatError(f"--ckpt last: no {parent}/DATE/{LAST} to go on from; leave --ckpt out to start")
    return found[-1]


def config_name(folder: Path) -> str:
    """config.yaml for the first process of a run, config_2.yaml for the one that goes on, and so forth."""
    names = ("config.yaml", *(f"config_{n}.yaml" for n in range(2, 10_000)))
    return next(name for name in names if not (folder / name).exists())


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and then takes its place, so that a complete one is always there."""

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


class MetricsFile(Logger):
    """metrics.csv: one line per entry, a column per metric; a resumed run goes on where its checkpoint was taken.

    Args:
        folder: of the run.
        flush_every: entries that are kept in memory before they are written.
    """

    def __init__(self, folder: Path, flush_every: int = 20) -> None:
        super().__init__()
        self.folder, self.path, self.flush_every = folder, folder / "metrics.csv", flush_every
        self.rows = 0  # on disk
        self._columns: list[str] = []
        self._pending: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Of the run."""
        return self.folder.parent.name

    @property
    def version(self) -> str:
        """The date of the run."""
        return self.folder.name

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config of the run lies beside."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add an entry."""
        self._pending.append({**metrics, "step": step})
        if len(self._pending) >= self.flush_every:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what is pending; a new column makes the file anew."""
        if not self._pending:
            return
        new = sorted({name for entry in self._pending for name in entry} - set(self._columns))
        if new or not self.rows:
            self._columns = sorted([*self._columns, *new])
            self._rewrite([*self._read(), *self._pending])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerows(self._pending)
        self.rows += len(self._pending)
        self._pending = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is pending."""
        self.save()

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Go on with the first ``rows`` entries of the file; what came after its checkpoint will come again."""
        entries = self._read()[:rows]
        self._columns, self.rows = list(entries[0]) if entries else [], len(entries)
        self._rewrite(entries)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, entries: Iterable[Mapping[str, Any]]) -> None:
        part = self.path.with_name(self.path.name + ".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(entries)
        part.replace(self.path)
