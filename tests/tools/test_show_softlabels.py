"""The picture shows an image, its crops and their labels."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.classes import forget_listings
from qat.data.crops import Crop, CropDistribution, draw, replay
from qat.data.decode import decode
from qat.data.folder import class_names, find_images, wnids
from qat.data.softlabels.reader import SoftLabels
from qat.data.softlabels.store import Header, ImageLabels, create, sha256_of
from qat.data.softlabels.writer import Writer
from qat.data.streams import rng_for
from tests.conftest import write_images

spec = importlib.util.spec_from_file_location("show_softlabels", Path(__file__).parents[2] / "tools/show_softlabels.py")
assert spec is not None
assert spec.loader is not None
tool = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tool  # where a dataclass looks for its types
spec.loader.exec_module(tool)

M = 8
SECOND = {"marginal_smoothing": 0.25, "marginal_renorm": 0.25 / 0.75, "hard": None}


def write_store(root: Path, label_type: str = "marginal_smoothing", rows: int = 6) -> Path:
    """Labels of the first images: half of the probability for class 1, a quarter for class 2."""
    paths, classes, k = find_images(root / "train"), class_names(root / "train"), 1 if label_type == "hard" else 2
    header = Header(
        teacher="tiny", teacher_sha256="", teacher_input_size=32, teacher_interpolation="bicubic", mean=(0.5,) * 3,
        std=(0.5,) * 3, temperature=1.0, label_type=label_type, top_k=k, num_crops=M, num_classes=len(classes),
        crop_scale=(0.08, 1.0), crop_ratio=(0.75, 4 / 3), flip_p=0.5, seed=0, batch_size=1, precision="32-true",
        split="train", class_list_sha256=sha256_of(classes), path_list_sha256=sha256_of(paths),
    )  # fmt: skip
    store = root / f"{label_type}.h5"
    create(store, header, paths, classes, "test")
    with Writer(store) as writer:
        for index in range(rows):
            crops = [draw(CropDistribution(), 40, 44, rng_for(0, index, m)) for m in range(M)]
            boxes = np.array([[c.top, c.left, c.height, c.width] for c in crops], np.uint16)
            flips = np.array([c.flip for c in crops])
            given = np.array([[1, 2][:k]] * M, np.uint16), np.array([[0.5, 0.25][:k]] * M, np.float16)
            writer.put(index, ImageLabels(boxes, flips, *given, (40, 44)))
    return store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images of three classes."""
    write_images(tmp_path / "train", 2, seed=0)
    return tmp_path


@pytest.fixture
def command(root, capsys):
    """Run the tool; its exit code and what it wrote to stderr."""

    def call(store: Path, *options: object) -> tuple[int, str]:
        capsys.readouterr()
        given = [store, "--data.root", root, "--output", root / "out.png", *options]
        code = tool.main([str(value) for value in given])
        return code, capsys.readouterr().err

    return call


def test_a_picture_is_written(command, root):
    assert command(write_store(root)) == (0, "")
    with Image.open(root / "out.png") as image:
        image.load()
        assert image.width > 1500
        assert np.asarray(image).std() > 10
    assert command(root / "marginal_smoothing.h5", "--crops", 1, "--output", root / "one.pdf") == (0, "")
    assert (root / "one.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("label_type", SECOND)
def test_what_is_shown_is_what_is_trained_on(label_type, root):
    store, second = write_store(root, label_type), SECOND[label_type]
    scene = tool.look(store, root, "bee/1.png", 5)
    assert (scene.path, scene.true, len(scene.crops)) == ("bee/1.png", "bee", 5)
    first = {"marginal_smoothing": 0.5, "marginal_renorm": 2 / 3, "hard": 1.0}[label_type]
    expected = [("bee", first, True)] + ([] if second is None else [("cat", second, False)])
    for (name, prob, true), (name_, prob_, true_) in zip(scene.crops[3].labels, expected, strict=True):
        assert (name, true, prob) == (name_, true_, pytest.approx(prob_))
    pixels, stored = decode(root / "train/bee/1.png"), SoftLabels(store).read(3)
    for shown, box, flip in zip(scene.crops, stored.boxes.tolist(), stored.flips.tolist(), strict=False):
        assert shown.crop == Crop(*box, flip)
        assert torch.equal(shown.pixels, replay(pixels, [Crop(*box, flip)], 224, "bilinear")[0])
        assert shown.title == (f"{shown.number} ⇄" if flip else str(shown.number))


def test_an_image_is_named_in_several_ways(root, monkeypatch):
    store, folder = write_store(root, rows=6), root / "train"
    monkeypatch.chdir(folder / "cat")
    for asked in ("5", "cat/1.png", str(folder / "cat/1.png"), "1.png", "../cat/1.png"):
        assert tool.look(store, root, asked, 1).path == "cat/1.png"


def test_the_first_image_with_labels_and_the_crops_there_are(root):
    store = write_store(root, rows=6)
    assert tool.look(store, root, None, None).path == "ant/0.png"
    assert len(tool.look(store, root, None, None).crops) == 6
    assert len(tool.look(store, root, None, 8).crops) == 8


def test_bad_input_is_one_line(command, root):
    store = write_store(root, rows=4)
    for options, message in [
        (["--image", "9"], "image is '9': give a number, 0..5, or a path such as"),
        (["--image", "dog/0.png"], "image is 'dog/0.png'"),
        (["--image", "5"], "has no labels yet for image 5"),
        (["--crops", "0"], "crops is 0: choose 1..8"),
        (["--crops", "9"], "crops is 9: choose 1..8"),
        (["--output", root / "none/out.png"], "cannot write"),
        (["--output", root / "out.xyz"], "give another --output"),
        (["--data.root", root / "none"], "is not a folder"),
    ]:
        code, error = command(store, *options)
        assert code == 2
        assert error.startswith("show_softlabels: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert "no soft labels" in command(root / "none.h5")[1]
    assert not (root / "out.png").exists()


def test_a_store_of_other_images_is_refused(command, root):
    store = write_store(root)
    Image.new("RGB", (30, 20)).save(root / "train/ant/0.png")
    assert "30 x 20 pixels, but its soft labels were made on 44 x 40" in command(store)[1]
    (root / "train/ant/0.png").rename(root / "train/ant/2.png")
    forget_listings()
    assert "was made on other images" in command(store)[1]
    forget_listings()


def test_an_image_that_cannot_be_read_is_named(command, root):
    store = write_store(root)
    (root / "train/ant/0.png").write_text("no image")
    assert f"cannot read {root / 'train/ant/0.png'}: not an image" in command(store)[1]


def test_matplotlib_may_be_missing(command, root, monkeypatch):
    imported = builtins.__import__

    def without(name: str, *more: object):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return imported(name, *more)

    store = write_store(root)
    monkeypatch.setattr(builtins, "__import__", without)
    code, error = command(store)
    assert code == 2
    assert "pip install 'qat[demo]'" in error


def test_classes_are_named_in_words():
    assert tool.described("n01440764") == "tench"
    assert tool.described("ant") == "ant"
    assert tool.described("a class with a name of 33 letters") == "a class with a name of 33 let…"
    assert all(tool.described(name)[-1] != "…" for name in wnids())


def test_numbers_lie_in_their_boxes_and_apart():
    drawn = [draw(CropDistribution((0.2, 0.936)), 375, 500, rng_for(0, 0, i)) for i in range(8)]
    crops = [*drawn, Crop(0, 0, 375, 500, True)]
    places = tool.tags(crops, [35.0] * 9, 20.0, (375, 500))
    for crop, (left, top, right, bottom) in zip(crops, places, strict=True):
        assert crop.left <= left < right <= crop.left + crop.width
        assert crop.top <= top < bottom <= crop.top + crop.height
        assert (right - left, bottom - top) == (pytest.approx(35), pytest.approx(20))
    assert not any(tool.overlap(a, b) for a, b in combinations(places, 2))
    same = [Crop(10, 20, 100, 100, False)] * 3  # by hand: along the upper edge, corners first
    assert tool.tags(same, [30.0] * 3, 20.0, (375, 500)) == [(20, 10, 50, 30), (90, 10, 120, 30), (50, 10, 80, 30)]


def test_no_text_runs_into_another(root):
    from matplotlib.figure import Figure

    crop, long = draw(CropDistribution(), 400, 500, rng_for(0, 0, 0)), "American Staffordshire terrier"
    labels = [(long, 1.0, True), (long, 0.3, False)]
    shown = [tool.Shown(i + 1, crop, torch.zeros(3, 224, 224, dtype=torch.uint8), labels) for i in range(3)]
    figure = Figure(dpi=110)
    tool.compose(tool.Scene("ant/0.png", torch.zeros(3, 400, 500, dtype=torch.uint8), "ant", "store", shown), figure)
    figure.canvas.draw()
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    assert len(texts) == 2 + 3 + 3 * 5
    found = [text.get_window_extent() for text in texts]
    whole = figure.bbox
    assert all(box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1 for box in found)
    assert not any(a.overlaps(b) for a, b in combinations(found, 2))
