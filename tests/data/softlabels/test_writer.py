"""Writing survives what can happen to a process, and parts of a store become a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qat.data.softlabels.opening import open_store
from qat.data.softlabels.store import create
from qat.data.softlabels.writer import Writer, absorb
from qat.errors import QatError
from tests.data.softlabels.stores import CLASSES, PATHS, header, labels_of, write

KILLED = """
import sys, time
from pathlib import Path
from qat.data.softlabels.writer import Writer
from tests.data.softlabels.stores import header, labels_of
writer = Writer(Path(sys.argv[1]), flush_seconds=0.2)
for index in range(6):
    writer.put(index, labels_of(index, header()))
time.sleep(1)  # flushed by now
for index in range(6, 10):
    writer._every = 1000
    writer.put(index, labels_of(index, header()))
print("ready", flush=True)
time.sleep(60)
"""


def finished(path: Path) -> list[int]:
    with open_store(path) as file:
        return file["done"][:].nonzero()[0].tolist()


def test_a_kill_costs_no_more_than_the_last_flush_and_the_rest_can_be_added(tmp_path: Path) -> None:
    path = tmp_path / "labels.h5"
    create(path, header(), PATHS, CLASSES, "tests")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert set(finished(path)) >= set(range(6))
    with Writer(path) as writer:
        for index in sorted(set(range(10)) - set(finished(path))):
            writer.put(index, labels_of(index, header()))
    write(tmp_path / "whole.h5")
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def put(path: Path, index: int, times: int = 1, error: str = "", flush_seconds: float = 1000) -> None:
    with Writer(path, flush_seconds) as writer:
        for _ in range(times):
            writer.put(index, labels_of(index, header()))
        if error:
            raise QatError(error)


def test_an_error_of_the_caller_loses_nothing_that_was_handed_over(tmp_path: Path) -> None:
    path = tmp_path / "labels.h5"
    create(path, header(), PATHS, CLASSES, "tests")
    with pytest.raises(QatError, match="bad image"):
        put(path, 3, error="bad image")
    assert finished(path) == [3]


@pytest.mark.parametrize(("times", "flush_seconds"), [(2000, 0.01), (1, 1000.0)], ids=["many", "at the end"])
def test_a_row_that_cannot_be_written_stops_the_work_without_hanging(
    tmp_path: Path, times: int, flush_seconds: float
) -> None:
    path = tmp_path / "labels.h5"
    create(path, header(), PATHS, CLASSES, "tests")
    with pytest.raises(QatError, match=r"cannot write .*labels.h5"):
        put(path, 99, times, flush_seconds=flush_seconds)


def test_parts_become_a_whole_and_only_their_finished_rows_count(tmp_path: Path) -> None:
    path, part = tmp_path / "labels.h5", tmp_path / "labels.h5.rank1"
    write(path, rows=[0, 1, 2])
    write(part, rows=[2, 7, 9])
    absorb(path, part)
    assert finished(path) == [0, 1, 2, 7, 9]
    assert not part.exists()
    write(part, rows=[3, 4, 5, 6, 8])
    absorb(path, part)
    write(tmp_path / "whole.h5")
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_part_that_was_made_with_other_options_is_refused_and_kept(tmp_path: Path) -> None:
    path, part = tmp_path / "labels.h5", tmp_path / "labels.h5.rank1"
    write(path, rows=[0])
    write(part, seed=1)
    with pytest.raises(QatError, match="rank1 was made with other options"):
        absorb(path, part)
    assert part.exists()
    assert finished(path) == [0]
