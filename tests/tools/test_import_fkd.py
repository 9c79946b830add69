"""A set of FKD becomes a store, also after an interruption, and label files that do not fit are refused."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from qat.data.classes import forget_listings
from qat.data.crops import CropDistribution, draw
from qat.data.decode import decode
from qat.data.folder import find_images
from qat.data.softlabels.fkd import LabelFolder
from qat.data.softlabels.reader import SoftLabels
from qat.data.softlabels.replay import ReplayView
from qat.data.source import Source
from qat.data.streams import rng_for
from tests.conftest import CLASSES, write_images
from tools.import_fkd import main

M, H, W = 12, 40, 44


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images of three classes, some with dots in their names."""
    write_images(tmp_path / "data/train", 2, seed=0)
    for name in CLASSES:
        (tmp_path / f"data/train/{name}/1.png").rename(tmp_path / f"data/train/{name}/x.y.z.png")
    return tmp_path / "data"


def write_labels(folder: Path, data: Path, dtype: type = np.float32) -> dict[str, list[np.ndarray]]:
    """A file for every image below a folder, of labels with one class; their contents, and the boxes in pixels."""
    made = {}
    for index, path in enumerate(find_images(data / "train")):
        crops = [draw(CropDistribution((0.08, 0.936)), H, W, rng_for(0, 0, 100 * index + m)) for m in range(M)]
        boxes = np.array([[c.top, c.left, c.height, c.width] for c in crops])
        rng = np.random.default_rng(index)
        labels = np.stack([rng.integers(0, 3, M), rng.uniform(0.4, 1, M)], 1).astype(dtype)
        content = [(boxes / [H, W, H, W]).astype(dtype), np.array([c.flip for c in crops]), labels]
        file = folder / path.partition("/")[0] / (Path(path).name.partition(".")[0] + ".tar")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)
        made[path] = [boxes, *content[1:]]
    return made


@pytest.fixture
def command(tmp_path, data, capsys):
    """Run the command on the folder ``set``; its exit code and what it wrote to stderr."""

    def call(*options: str, label_type: str = "smoothing", trust: str = "true") -> tuple[int, str]:
        given = ["--data.root", data, "--teacher", "l2", "--out", tmp_path / "out.h5", "--label_type", label_type]
        capsys.readouterr()
        code = main([str(tmp_path / "set"), *map(str, given), "--trust_pickles", trust, *options])
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("layout", "dtype"), [("imagenet/train", np.float32), ("train", np.float16), (".", np.float32)]
)
def test_a_set_is_imported_and_replayed(layout, dtype, command, data, tmp_path):
    made = write_labels(tmp_path / "set" / layout, data, dtype)
    assert command() == (0, "")
    labels, paths = SoftLabels(tmp_path / "out.h5"), find_images(data / "train")
    labels.check_images(Source(data / "train", paths), CLASSES)
    labels.check_finished(partial=False)
    header = labels.header
    assert (header.teacher, header.num_crops, header.top_k, header.label_type) == ("l2", M, 1, "marginal_smoothing")
    assert (header.teacher_sha256, header.seed, header.batch_size, header.precision) == ("", -1, 0, "unknown")
    assert (header.teacher_input_size, header.teacher_interpolation) == (475, "bicubic")
    assert header.crop_scale == (0.08, 0.936)
    for index, path in enumerate(paths):
        stored, (boxes, flips, expected) = labels.read(index), made[path]
        assert np.array_equal(stored.boxes, boxes)
        assert np.array_equal(stored.flips, flips)
        assert np.array_equal(stored.classes[:, 0], expected[:, 0])
        assert np.array_equal(stored.probs[:, 0], expected[:, 1].astype(np.float16))
        assert stored.image_size == (H, W)

    view, out = ReplayView(labels, np.arange(6), 32, "bilinear", 4, 0, 0), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    soft_labels = view(decode(data / "train" / paths[3]), 3, out)
    assert out.any()
    assert soft_labels.probs.shape == (4, 1)


def test_options_are_stored(command, data, tmp_path):
    write_labels(tmp_path / "set", data)
    options = ["--teacher_input_size", "288", "--mean", "[0.5,0.5,0.5]", "--crop_scale", "[0.2,1]", "--temperature=2"]
    assert command(*options)[0] == 0
    header = SoftLabels(tmp_path / "out.h5").header
    assert (header.teacher_input_size, header.mean, header.crop_scale) == (288, (0.5, 0.5, 0.5), (0.2, 1.0))
    assert header.temperature == 2


def test_a_damaged_file_loses_nothing_and_a_restart_continues(command, data, tmp_path):
    made = write_labels(tmp_path / "set", data)
    damaged = tmp_path / "set/bee/x.tar"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:100])
    code, error = command()
    assert code == 2
    assert error.startswith(f"qat: error: cannot read {damaged}, it may be damaged or incomplete")
    assert error.count("\n") == 1
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["done"][:].tolist() == [1, 1, 1, 0, 0, 0]

    damaged.write_bytes(good)
    assert command() == (0, "")
    labels = SoftLabels(tmp_path / "out.h5")
    assert labels.done.all()
    for index, path in enumerate(find_images(data / "train")):
        assert np.array_equal(labels.read(index).boxes, made[path][0])


def test_rows_that_are_done_are_not_read_again(command, data, tmp_path, monkeypatch):
    write_labels(tmp_path / "set", data)
    assert command()[0] == 0
    read = []
    original = LabelFolder.read
    monkeypatch.setattr(LabelFolder, "read", lambda self, path, *more: read.append(path) or original(self, path, *more))
    assert command() == (0, "")
    assert read == ["ant/0.png"]  # the look at the first file


def test_a_restart_with_other_options_is_refused(command, data, tmp_path):
    write_labels(tmp_path / "set", data)
    assert command()[0] == 0
    code, error = command("--interpolation", "bilinear", "--teacher_input_size", "300")
    assert code == 2
    assert "teacher_input_size 475 -> 300, interpolation bicubic -> bilinear" in error
    (data / "train/cat/0.png").unlink()
    forget_listings()
    assert "labels were made on other images than those of data.root: first, 'cat/x.y.z.png' is here" in command()[1]
    forget_listings()


def test_files_of_arrays_need_no_trust(command, data, tmp_path, caplog):
    write_labels(tmp_path / "set", data)
    with caplog.at_level("INFO"):
        assert command(trust="false") == (0, "")
    assert "6 of 6 images have labels, 6 of them made now in 0:00:00" in caplog.messages[-2]
    out, root = tmp_path / "out.h5", tmp_path / "data"
    assert caplog.messages[-1] == f"next: qat fit --config CONFIG --data.root {root} --data.softlabels {out}"


def test_files_of_other_things_are_not_read_without_trust(command, data, tmp_path):
    write_labels(tmp_path / "set", data)
    torch.save([Path("a")], tmp_path / "set/ant/0.tar")
    code, error = command(trust="false")
    assert code == 2
    assert "can run code" in error
    assert "trust_pickles true" in error
    assert not (tmp_path / "out.h5").exists()


def test_what_does_not_fit_is_refused_before_there_is_a_store(command, data, tmp_path):
    assert "no folder of a class below" in command()[1]
    write_labels(tmp_path / "set", data)
    assert (
        "its labels are (12, 2), expected (12, 2, 5): give the label_type" in command(label_type="marginal_renorm")[1]
    )
    assert "label_type" in command(label_type="other")[1]
    assert "nope" in command("--interpolation", "nope")[1]
    assert "crop scale is (0.5, 0.1)" in command("--crop_scale", "[0.5,0.1]")[1]
    assert "there is no folder" in command("--out", str(tmp_path / "none/out.h5"))[1]
    (tmp_path / "set/cat/0.tar").unlink()
    assert f"no label file {tmp_path / 'set/cat/0.tar'}, nor those of 0 more of 6 images" in command()[1]
    assert not (tmp_path / "out.h5").exists()


def test_another_number_of_crops_is_refused(command, data, tmp_path):
    write_labels(tmp_path / "set", data)
    content = torch.load(tmp_path / "set/cat/x.tar", weights_only=False)
    torch.save([part[:5] for part in content], tmp_path / "set/cat/x.tar")
    assert f"{tmp_path / 'set/cat/x.tar'}: it has 5 crops, the store has 12" in command()[1]
    assert SoftLabels(tmp_path / "out.h5").done.tolist() == [True] * 5 + [False]
