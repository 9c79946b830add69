"""Being told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.runs.stop import Stopped, defer, deferred, raise_if_told, stoppable, told


def test_a_signal_raises_unless_the_work_looks_for_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM$") as stopped, stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with stoppable(), deferred():
        defer()
        os.kill(os.getpid(), signal.SIGINT)
        assert told() == signal.SIGINT
        with pytest.raises(Stopped, match=r"^stopped at step 3$") as stopped:
            raise_if_told("at step 3")
        assert stopped.value.code == 130


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    class Ends:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with stoppable():
        Ends()  # Python would print an exception here, and go on
        with pytest.raises(Stopped):
            raise_if_told()


TWICE = """
import time
from qat.runs.stop import defer, deferred, stoppable
from qat.runs.writing import replacing
from pathlib import Path
import sys

with stoppable(), deferred(), replacing(Path(sys.argv[1])):
    defer()
    print("ready", flush=True)
    time.sleep(60)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", TWICE, str(tmp_path / "file")]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for pause in (0.2, 1.2):  # a launcher may pass the first Ctrl-C on
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    assert not list(tmp_path.iterdir())
