"""A logger that writes metrics.csv and loses nothing when a run is killed and resumed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from qat.errors import QatError
from qat.runs.writing import replacing, writing


class MetricsFile(Logger):
    """metrics.csv: one line per entry, one column per metric.

    Args:
        folder: folder of the run.
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
        """The name of the run."""
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
        """Do nothing: the config of the run is in the same folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add an entry; it is written with the next `save`."""
        self._pending.append({**metrics, "step": step})
        if len(self._pending) >= self.flush_every:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Append the pending entries; the file is rewritten where they bring a new column."""
        if not self._pending:
            return
        new = sorted({name for entry in self._pending for name in entry} - set(self._columns))
        if new or not self.rows:
            self._rewrite([*self._read(), *self._pending], sorted([*self._columns, *new]))
        else:
            with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerows(self._pending)
        self.rows += len(self._pending)
        self._pending = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the pending entries; after an error, of which the user is about to hear, only where that works."""
        with suppress(QatError) if status == "failed" else nullcontext():
            self.save()

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Keep the first ``rows`` entries of the file: a resumed run logs those after its checkpoint again."""
        entries = self._read()[:rows]
        self._rewrite(entries, list(entries[0]) if entries else [])
        self.rows = len(entries)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, entries: Iterable[Mapping[str, Any]], columns: list[str]) -> None:
        with replacing(self.path) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(entries)
        self._columns = columns
