"""The file of metrics."""

from __future__ import annotations

import csv
from pathlib import Path

from qat.runs.metrics import MetricsFile


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


class TestMetricsFile:
    def test_columns_grow_and_nothing_is_lost(self, tmp_path: Path) -> None:
        metrics = MetricsFile(tmp_path, flush_every=2)
        metrics.log_metrics({"loss": 1.5}, 0)
        assert not metrics.path.exists()
        metrics.log_metrics({"loss": 1.25}, 1)
        metrics.log_metrics({"top1": 50.0}, 1)
        metrics.finalize("success")
        assert rows(metrics.path) == [
            {"loss": "1.5", "step": "0"}, {"loss": "1.25", "step": "1"}, {"top1": "50.0", "step": "1"}
        ]  # fmt: skip
        assert metrics.rows == 3
        assert not list(tmp_path.glob("*.part"))

    def test_a_resumed_run_logs_again_what_came_after_its_checkpoint(self, tmp_path: Path) -> None:
        killed = MetricsFile(tmp_path, flush_every=1)
        for step in range(5):
            killed.log_metrics({"loss": float(step)}, step)
        resumed = MetricsFile(tmp_path, flush_every=1)
        resumed.keep(3)
        resumed.log_metrics({"loss": 30.0}, 3)
        resumed.log_metrics({"top1": 1.0}, 4)
        assert [row.get("loss") for row in rows(resumed.path)] == ["0.0", "1.0", "2.0", "30.0", None]

    def test_keeping_none_forgets_all(self, tmp_path: Path) -> None:
        MetricsFile(tmp_path, flush_every=1).log_metrics({"loss": 1.0}, 0)
        resumed = MetricsFile(tmp_path, flush_every=1)
        resumed.keep(0)
        resumed.log_metrics({"other": 2.0}, 0)
        assert rows(resumed.path) == [{"other": "2.0", "step": "0"}]
