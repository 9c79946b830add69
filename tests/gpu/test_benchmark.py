"""`benchmarks/gpu.py` as a rehearsal on the CPU, so that it works when there is a GPU to measure."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ["--device", "cpu", "--quick"]
ROWS = {"training": 9, "pipeline": 2, "labels": 1, "calibration": 6, "evaluation": 5}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The script; it imports its neighbours, which Python finds when it is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("gpu")


@pytest.mark.parametrize("part", ROWS)
def test_every_part_measures_what_it_lists(part, gpu, capsys):
    assert gpu.main([*QUICK, "--one", part]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) == ROWS[part]
    for row in rows:
        assert all(value > 0 for value in row.values() if isinstance(value, float)), row


@pytest.fixture
def fake_parts(gpu, monkeypatch, tmp_path) -> None:
    """In the place of the script that is started for a part: one row, and then a failure or a long sleep."""
    script = tmp_path / "part.py"
    script.write_text(
        "import sys, time\n"
        "print('{\"x\": 0.5}', flush=True)\n"
        "if sys.argv[-1] == 'training': raise ValueError('out of memory')\n"
        "if sys.argv[-1] == 'pipeline': time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setitem(gpu.LIMITS, "pipeline", 2)


def test_parts_that_fail_or_take_too_long_are_recorded_and_the_next_one_runs(gpu, fake_parts, capsys, tmp_path):
    out = tmp_path / "gpu.json"
    assert gpu.main([*QUICK, "--out", str(out), "--parts", "training", "pipeline", "evaluation"]) == 1
    found = json.loads(out.read_text())
    assert found["device"] == "CPU"
    assert [part["rows"] for part in found["parts"].values()] == [[{"x": 0.5}]] * 3
    errors = {name: part["error"] for name, part in found["parts"].items()}
    assert errors == {"training": "ValueError: out of memory", "pipeline": "stopped after 2 s", "evaluation": None}
    printed = capsys.readouterr().out
    assert "training FAILED: ValueError: out of memory" in printed
    assert printed.count("0.5") == 3


def test_the_limits_leave_less_than_eight_minutes(gpu):
    assert gpu.LIMITS.keys() == gpu.PARTS.keys() == ROWS.keys()
    assert sum(gpu.LIMITS.values()) < 8 * 60
