"""Making soft labels ends in many ways, in real processes; what is finished is kept, and the rest can be made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from qat.data.folder import class_names, find_images
from qat.data.softlabels.reader import SoftLabels
from qat.data.softlabels.store import create
from qat.data.softlabels.writer import Writer
from qat.labeling.output import software
from tests.conftest import label_options
from tests.data.softlabels.small_disk import fill, small_disk
from tools.make_softlabels import main

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
from qat.data.softlabels.teacher_batches import TeacherBatches
original = TeacherBatches.batches
def slowly(self, block):
    time.sleep(0.4)
    if block >= 4:
        print("block", flush=True)
    yield from original(self, block)
TeacherBatches.batches = slowly
from tools.make_softlabels import main
sys.exit(main())
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A program that is the tool, with blocks that take half a second each, and a line for all but the first four."""
    (tmp_path / "program").mkdir()
    program = tmp_path / "program" / "slow.py"
    program.write_text(SLOW)
    return program


def start(program: Path, *words: str) -> subprocess.Popen[str]:
    """Start a program in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(program), *words], start_new_session=True, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 kB."""
    with small_disk(tmp_path / "disk", 512) as folder:
        yield folder


@pytest.fixture(scope="module")
def whole(images: Path, ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of 200 crops of every image, 78 kB, made without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "labels.h5"
    assert main(label_options(images, ckpt, out, crops=200, batch_size=200)) == 0
    return out


def begin_with_holes(out: Path, whole: Path, images: Path) -> None:
    """A store whose first image alone has labels, as one of several processes begins it: without its space."""
    labels, folder = SoftLabels(whole), images / "train"
    create(out, labels.header, find_images(folder), class_names(folder), software(), reserve=False)
    with Writer(out) as writer:
        writer.put(0, labels.read(0))


def test_a_disk_that_becomes_full_loses_nothing(images: Path, ckpt: Path, whole: Path, disk: Path) -> None:
    out = disk / "labels.h5"
    begin_with_holes(out, whole, images)
    filler = fill(disk, leave=20_480)
    words = label_options(images, ckpt, out, crops=200, batch_size=200, flush_seconds=0.05)
    process = start(ROOT / "tools" / "make_softlabels.py", *words)
    _, printed = process.communicate(timeout=200)
    assert process.returncode == 2
    assert [line for line in printed.splitlines() if "error" in line] == [
        f"qat: error: cannot write {out}: No space left on device; labels made so far are kept, the same command goes "
        "on from there"
    ]
    assert "Traceback" not in printed
    labels, expected = SoftLabels(out), SoftLabels(whole)
    assert 1 < labels.done.sum() < 24
    for index in np.flatnonzero(labels.done):
        assert all(map(np.array_equal, labels.read(index), expected.read(index)))
    filler.unlink()
    assert main(words) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_disk_that_is_full_is_noticed_before_the_work(
    images: Path, ckpt: Path, whole: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = fill(disk, leave=90_112)  # the labels fit, HDF5's own data do not
    words = label_options(images, ckpt, disk / "labels.h5", crops=200, batch_size=200)
    assert main(words) == 2
    assert f"cannot write {disk / 'labels.h5'}: No space left on device" in capsys.readouterr().err
    assert [path.name for path in disk.iterdir()] == ["filler"]
    fill(disk, leave=40_960)
    assert main(words) == 2
    assert "0.1 MB are needed, 0.0 MB are free there" in capsys.readouterr().err
    filler.unlink()
    assert main(words) == 0
    assert (disk / "labels.h5").stat().st_blocks * 512 >= (disk / "labels.h5").stat().st_size
    assert (disk / "labels.h5").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("number", "to_all", "changes"),
    [
        (signal.SIGINT, True, {"devices": 2, "workers": 1}),
        (signal.SIGTERM, False, {}),
    ],
    ids=["Ctrl-C in a terminal, two processes with workers", "SIGTERM"],
)
def test_a_command_that_is_told_to_end_says_how_far_it_is_and_goes_on(
    number: signal.Signals,
    to_all: bool,
    changes: dict[str, object],
    slow: Path,
    images: Path,
    ckpt: Path,
    softlabels: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out" / "labels.h5"
    out.parent.mkdir()
    process = start(slow, *label_options(images, ckpt, out, flush_seconds=1000, **changes))
    assert process.stdout is not None
    assert any(line == "block\n" for line in process.stdout)
    (os.killpg if to_all else os.kill)(process.pid, number)
    printed = process.communicate(timeout=100)[1]
    assert process.returncode == 128 + number, printed
    last = printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert "error" not in printed
    assert "Interrupt" not in printed
    done = sum(int(h5py.File(path)["done"][:].sum()) for path in out.parent.glob("labels.h5*"))
    assert last == f"qat: stopped with labels of {done} of 24 images in {out}; run the same command again to go on"
    assert 0 < done < 24
    assert not (out.parent / "labels.h5.lock").exists()
    assert main(label_options(images, ckpt, out)) == 0
    assert out.read_bytes() == softlabels.read_bytes()


def test_a_process_that_is_killed_ends_the_others_in_one_line(
    slow: Path, images: Path, ckpt: Path, softlabels: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels.h5"
    process = start(slow, *label_options(images, ckpt, out, devices=2, flush_seconds=1000))
    assert process.stdout is not None
    assert any(line == "block\n" for line in process.stdout)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("this system does not list the children of a process")
    (child,) = (int(word) for word in children.read_text().split())
    os.kill(child, signal.SIGKILL)
    printed = process.communicate(timeout=100)[1]
    assert process.returncode == 2, printed
    assert "qat: error: another process of this command has ended with code -9; labels made so far are kept" in printed
    assert "Traceback" not in printed
    assert main(label_options(images, ckpt, out)) == 0
    assert out.read_bytes() == softlabels.read_bytes()


HELD = """
import sys
from pathlib import Path
from qat.data.softlabels.locking import only_maker
with only_maker(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_command_to_the_same_file_is_refused_at_once(
    images: Path, ckpt: Path, softlabels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.h5"
    words = [sys.executable, "-c", HELD, str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        began = time.monotonic()
        assert main(label_options(images, ckpt, out)) == 2
        assert time.monotonic() - began < 3
        assert f"{out} is being made by process {process.pid} on " in capsys.readouterr().err
        process.communicate()
    assert not list(tmp_path.iterdir())
    assert main(label_options(images, ckpt, out)) == 0
    assert out.read_bytes() == softlabels.read_bytes()


def test_a_file_of_another_kind_is_refused_and_left_alone(
    images: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "last.ckpt").write_bytes(ckpt.read_bytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.zeros(3)
    os.mkfifo(tmp_path / "pipe")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name, words in (
        ("notes.txt", "which exists and is no store of soft labels"),
        ("last.ckpt", "which exists and is no store of soft labels"),
        ("other.h5", "is not a store of soft labels: its attribute 'format' is None"),
        ("pipe", "which is not a file that can be read and written"),
    ):
        assert main(label_options(images, ckpt, tmp_path / name)) == 2
        printed = capsys.readouterr().err
        assert words in printed
        assert printed.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == 4
