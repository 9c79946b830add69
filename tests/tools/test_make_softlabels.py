"""Making soft labels through the real command, with a tiny teacher: in one process, in two, killed and resumed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qat import checkpoint
from qat.data.crops import replay
from qat.data.decode import decode
from qat.data.folder import find_images
from qat.data.softlabels.reader import SoftLabels
from qat.preprocessing import Preprocessing
from tests.conftest import label_options, with_broken
from tools.make_softlabels import main

TOOL = Path(__file__).parents[2] / "tools" / "make_softlabels.py"


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(list(args)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def start(*args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(TOOL), *args], text=True, stderr=subprocess.PIPE, env=environment)


@torch.no_grad()
def test_labels_are_what_the_teacher_says_of_the_replayed_crops(images: Path, ckpt: Path, softlabels: Path) -> None:
    store, teacher = SoftLabels(softlabels), checkpoint.load(ckpt)
    seen = Preprocessing(**checkpoint.read(ckpt)[0].preprocessing)
    assert store.done.all()
    for number, path in enumerate(find_images(images / "train")):
        labels = store.read(number)
        views = replay(decode(images / "train" / path), labels.crops(), seen.size, seen.interpolation)
        probs, classes = teacher(seen.normalize(views)).softmax(-1).topk(2)
        assert np.array_equal(labels.classes, classes)
        np.testing.assert_allclose(labels.probs, probs, atol=3e-4)  # half precision
        assert labels.image_size == (40, 44)


def test_the_same_command_again_changes_nothing(images: Path, ckpt: Path, softlabels: Path) -> None:
    before = softlabels.read_bytes()
    assert main(label_options(images, ckpt, softlabels)) == 0
    assert softlabels.read_bytes() == before


def test_workers_change_nothing(images: Path, ckpt: Path, softlabels: Path, tmp_path: Path) -> None:
    assert main(label_options(images, ckpt, tmp_path / "labels.h5", workers=2)) == 0
    assert (tmp_path / "labels.h5").read_bytes() == softlabels.read_bytes()


def test_two_processes_make_the_same_bytes(images: Path, ckpt: Path, softlabels: Path, tmp_path: Path) -> None:
    process = start(*label_options(images, ckpt, tmp_path / "labels.h5", devices=2))
    assert process.communicate(timeout=300)[1]
    assert process.returncode == 0
    assert (tmp_path / "labels.h5").read_bytes() == softlabels.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["labels.h5"]


HALTED = """
import sys, time
from qat.data.softlabels.teacher_batches import TeacherBatches
original = TeacherBatches.batches
def until_the_sixth(self, block):
    if block >= 5:
        time.sleep(2)  # for the writer to flush
        print("halted", flush=True)
        time.sleep(600)
    yield from original(self, block)
TeacherBatches.batches = until_the_sixth
from tools.make_softlabels import main
sys.exit(main())
"""


def test_a_killed_run_of_two_processes_is_finished_by_one_to_the_same_bytes(
    images: Path, ckpt: Path, softlabels: Path, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "halted.py").write_text(HALTED)
    out = tmp_path / "work" / "l[1].h5"
    words = label_options(images, ckpt, out, devices=2, flush_seconds=0.3)
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "halted.py"), *words],
        start_new_session=True, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    halted = (line for line in process.stdout if line == "halted\n")  # gloo may say something too
    assert len([next(halted) for _ in range(2)]) == 2
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(out.parent.iterdir())) == 4  # the store, its lock, and a part of each process
    (out.parent / "l[1].h5.rank2.new").write_bytes(b"killed while it was created")
    (out.parent / "l[1].h5.mine").write_bytes(b"of somebody else")
    done = sum(int(SoftLabels(path).done.sum()) for path in out.parent.glob("*[0-9]") if path != out)
    assert 0 < done + SoftLabels(out).done.sum() < 24
    assert main(label_options(images, ckpt, out)) == 0  # one process takes over what two have left
    assert out.read_bytes() == softlabels.read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["l[1].h5", "l[1].h5.mine"]


def test_an_error_of_the_first_process_ends_the_others_and_keeps_their_labels(
    images: Path, ckpt: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    with_broken(images, root, "cat/7.png")
    result = start(*label_options(root, ckpt, tmp_path / "labels.h5", devices=2, batch_size=6))
    assert "cannot read" in result.communicate(timeout=300)[1]
    assert result.returncode
    assert main(label_options(root, ckpt, tmp_path / "labels.h5", batch_size=6, on_bad_image="skip")) == 0
    assert SoftLabels(tmp_path / "labels.h5").done.sum() == 23


def test_a_store_without_labels_is_begun_anew_with_other_options(images: Path, ckpt: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "labels.h5"
    first, good = with_broken(images, root, "ant/0.png")
    assert main(label_options(root, ckpt, out)) == 2
    first.write_bytes(good)
    assert main(label_options(root, ckpt, out, crops=7, batch_size=7)) == 0
    assert SoftLabels(out).header.num_crops == 7


def test_other_options_are_refused_by_name(
    images: Path, ckpt: Path, softlabels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = softlabels.read_bytes()
    changed = label_options(images, ckpt, softlabels, crops=7, temperature=2.0, seed=5)
    line = fails(capsys, *changed)
    assert "begun with other options (temperature 1.0 -> 2.0, crops 6 -> 7, seed 0 -> 5)" in line
    assert softlabels.read_bytes() == before


def test_other_images_are_refused_by_the_first_that_differs(
    images: Path, ckpt: Path, softlabels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/train/bee/3.png").rename(tmp_path / "images/train/bee/new.png")
    line = fails(capsys, *label_options(tmp_path / "images", ckpt, softlabels))
    assert "'bee/4.png' is here where the labels have 'bee/3.png'" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "deit_tinny"}, "timm 1.* has no model 'deit_tinny'"),
        (
            {"teacher": "deit_small_patch16_224"},
            "teacher is deit_small_.*, but .* is a checkpoint of deit_tiny",
        ),
        ({"teacher_checkpoint": "pretrained", "data.root": "nowhere"}, "nowhere"),
        ({"topk": 4}, r"topk is 4: choose 1\.\.3"),
        ({"label_type": "hard"}, "hard labels are one class"),
        ({"crops": 0}, "crops is 0"),
        ({"crops": 65_537}, "crops is 65537: give an integer from 1 to"),
        ({"out": "/nowhere/labels.h5"}, "there is no folder /nowhere"),
        ({"out": "/tmp"}, "out is /tmp, a folder"),
        ({"crop": 3}, "crop"),
        ({"flush_seconds": 0}, "flush_seconds is 0.0: give a number above 0"),
        ({"precision": "16-true"}, "precision"),
        ({"precision": "16-mixed"}, "16-mixed, which needs a GPU"),
        ({"accelerator": "abacus"}, "accelerator abacus, devices 1: "),
        ({"crop_scale": "[0.5,2.0]"}, "crop_scale is"),
    ],
    ids=str,
)
def test_bad_options_end_in_one_line(
    images: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: str
) -> None:
    line = fails(capsys, *label_options(images, ckpt, tmp_path / "labels.h5", **changes))
    assert line.startswith("qat: error: ")
    assert re.search(words, line)
    assert not list(tmp_path.iterdir())


def test_an_unreadable_image_stops_the_work_or_is_left_out(
    images: Path, ckpt: Path, softlabels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "images", tmp_path / "labels.h5"
    broken, good = with_broken(images, root, "bee/3.png")
    line = fails(capsys, *label_options(root, ckpt, out))
    assert f"cannot read {broken}: not an image; repair it, or set on_bad_image skip" in line
    assert SoftLabels(out).done.sum() == 11  # what came before is kept
    assert main(label_options(root, ckpt, out, on_bad_image="skip")) == 0
    assert np.flatnonzero(~SoftLabels(out).done).tolist() == [11]
    broken.write_bytes(good)
    assert main(label_options(root, ckpt, out)) == 0
    assert out.read_bytes() == softlabels.read_bytes()


def test_an_output_that_is_not_finite_is_refused_with_the_image(
    images: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, *label_options(images, ckpt, tmp_path / "labels.h5", temperature=1e-44))
    assert f"the teacher's output for {images / 'train/ant/0.png'} is not finite in 32-true: check its weights" in line
    assert not SoftLabels(tmp_path / "labels.h5").done.any()


def test_options_come_from_a_file_too(images: Path, ckpt: Path, softlabels: Path, tmp_path: Path) -> None:
    words = label_options(images, ckpt, tmp_path / "labels.h5")
    lines = [f"{name.removeprefix('--').replace('data.root', 'data')}: " for name in words[::2]]
    text = "".join(
        f"data: {{root: {value}}}\n" if line == "data: " else f"{line}{value}\n"
        for line, value in zip(lines, words[1::2], strict=True)
    )
    (tmp_path / "labels.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "labels.yaml")]) == 0
    assert (tmp_path / "labels.h5").read_bytes() == softlabels.read_bytes()


def test_the_help_says_what_the_options_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for words in ("--data.root", "timm model whose probabilities are stored", "marginal_renorm", "--num_nodes"):
        assert words in printed
