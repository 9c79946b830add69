"""Label files of FKD: boxes as Pillow replays them, labels of every type, files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import resized_crop

from qat.data.crops import CropDistribution, draw
from qat.data.softlabels.fkd import LabelFolder, class_folder, image_size, pixel_boxes
from qat.data.softlabels.fkd_label_types import LABEL_TYPES
from qat.data.softlabels.replay import recover
from qat.data.softlabels.store import Header
from qat.data.streams import rng_for
from qat.errors import QatError

CLASSES, PROBS = [3, 7, 0, 9, 2], [0.62, 0.15, 0.08, 0.05, 0.02]
FULL = [0.08, 0.016, 0.02, 0.62, 0.017, 0.018, 0.015, 0.15, 0.014, 0.05]
LABELS = {  # of one crop, C = 10
    "marginal_smoothing_k5": [CLASSES, PROBS],
    "marginal_smoothing_k10": [[3, 7, 0, 9, 2, 5, 4, 1, 6, 8], sorted(FULL, reverse=True)],
    "marginal_renorm": [CLASSES, PROBS],
    "marginal_renorm_k5": [CLASSES, PROBS],
    "smoothing": [3, 0.62],
    "hard": 3,
    "ori": FULL,
}
DENSE = {
    "marginal_smoothing_k5": [0.08, 0.016, 0.02, 0.62, 0.016, 0.016, 0.016, 0.15, 0.016, 0.05],
    "marginal_smoothing_k10": FULL,
    "marginal_renorm": [0.0869565, 0, 0.0217391, 0.6739130, 0, 0, 0, 0.1630435, 0, 0.0543478],
    "marginal_renorm_k5": [0.0869565, 0, 0.0217391, 0.6739130, 0, 0, 0, 0.1630435, 0, 0.0543478],
    "smoothing": [0.0422222] * 3 + [0.62] + [0.0422222] * 6,
    "hard": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    "ori": FULL,
}
BOX = [0.2, 0.4, 0.5, 0.26]


def content(label_type: str, dtype: type = np.float32, crops: int = 3) -> list[np.ndarray]:
    """A file in which all crops but for their flips are alike."""
    labels = np.stack([np.array(LABELS[label_type], dtype)] * crops)
    return [np.array([BOX] * crops, dtype), np.arange(crops) % 2 == 0, labels]


@pytest.fixture
def folder(tmp_path: Path):
    """Write a label file and an image of 50 x 40 pixels; return the labels that are read from them."""

    def read(value: object, label_type: str, classes: int = 10, crops: int = 3, trust: bool = True):
        (tmp_path / "labels/ant").mkdir(parents=True, exist_ok=True)
        torch.save(value, tmp_path / "labels/ant/0.tar")
        Image.new("RGB", (50, 40)).save(tmp_path / "0.png")
        made = LabelFolder(tmp_path / "labels", LABEL_TYPES[label_type], classes, trust)
        return made.read("ant/0.png", tmp_path / "0.png", crops)

    return read


@pytest.mark.parametrize(
    "fractions",
    [
        np.array([[0.21333334, 0.344, 0.55733335, 0.418]], np.float32),
        np.array([[0.2133789, 0.3439941, 0.5571289, 0.4179688]], np.float16),
    ],
)
def test_the_box_of_the_specification(fractions):
    assert pixel_boxes(fractions, 375, 500).tolist() == [[80, 172, 209, 209]]


def test_halves_are_rounded_to_even():
    fractions = np.array([[0.25, 0.75, 0.5, 0.25]], np.float32)  # top 2.5 -> 2, its end 7.5 -> 8; left 4.5 -> 4, 6
    assert pixel_boxes(fractions, 10, 6).tolist() == [[2, 4, 6, 2]]


def test_no_box_is_lost_in_single_precision():
    crops = [draw(CropDistribution(), 2848, 4288, rng_for(0, 0, i)) for i in range(2000)]
    boxes = np.array([[c.top, c.left, c.height, c.width] for c in crops])
    fractions = (boxes / [2848, 4288, 2848, 4288]).astype(np.float32)
    assert np.array_equal(pixel_boxes(fractions, 2848, 4288), boxes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_box_is_the_one_that_a_replay_cuts_out(dtype):
    rng = np.random.default_rng(0)
    rows, columns = np.meshgrid(np.arange(190), np.arange(250), indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, 0 * rows + 255], -1).astype(np.uint8))
    start = rng.uniform(0, 0.5, (100, 2))
    fractions = np.concatenate([start, rng.uniform(0.02, 0.98, (100, 2)) * (1 - start)], 1).astype(dtype)
    for (top, left, height, width), box in zip(fractions, pixel_boxes(fractions, 190, 250).tolist(), strict=True):
        exact = top.item() * 190, left.item() * 250, height.item() * 190, width.item() * 250
        cut = np.asarray(resized_crop(image, *exact, [box[2], box[3]]))  # to its own size: nothing is interpolated
        assert np.array_equal(cut, np.asarray(image)[box[0] : box[0] + box[2], box[1] : box[1] + box[3]])


def test_a_box_leaves_the_image_by_rounding_only():
    fractions = np.array([[0, 0.25 + 2**-12, 1, 0.75]])  # ends at 4097; in half precision the true end may be 4095.5
    assert pixel_boxes(fractions.astype(np.float16), 10, 4096).tolist() == [[0, 1025, 10, 3071]]
    with pytest.raises(QatError, match=r"crop 0, .* leaves its image of 4096 x 10"):
        pixel_boxes(fractions.astype(np.float32), 10, 4096)


def test_an_impossible_box_is_refused():
    for box in ([0, 0, 0.001, 1], [0, 0, 1, 0], [-0.1, 0, 0.5, 0.5], [0.6, 0, 0.6, 1], [0, 0, 1, np.nan]):
        with pytest.raises(QatError, match=r"the box of crop 1, .* is empty or leaves its image of 50 x 40"):
            pixel_boxes(np.array([BOX, box], np.float32), 40, 50)


@pytest.mark.parametrize(("label_type", "dtype"), list(zip(LABEL_TYPES, [np.float32, np.float16] * 4, strict=False)))
def test_every_label_type_is_recovered(label_type, dtype, folder):
    found = folder(content(label_type, dtype), label_type)
    assert found.boxes.tolist() == [[8, 20, 20, 13]] * 3
    assert found.flips.tolist() == [True, False, True]
    assert found.image_size == (40, 50)
    kind = LABEL_TYPES[label_type]
    assert found.classes.shape == (3, kind.top_k or 10)
    assert (np.diff(found.probs.astype(np.float32), axis=1) <= 0).all()

    header = object.__new__(Header)  # of which one value matters
    object.__setattr__(header, "label_type", kind.stored_as)
    labels = recover(header, found.classes, found.probs)
    others = 10 - labels.classes.shape[1]
    filler = (1 - labels.probs.sum(1, keepdim=True)).clamp(min=0) / max(others, 1)
    dense = filler.expand(-1, 10).scatter(1, labels.classes, labels.probs)
    assert dense[1].tolist() == pytest.approx(DENSE[label_type], abs=6e-4)  # half precision


def test_hard_labels_come_in_two_shapes_and_as_integers(folder):
    boxes, flips, _ = content("hard")
    for labels in (np.array([[3.0], [1.0], [9.0]], np.float32), np.array([3, 1, 9])):
        found = folder([boxes, flips, labels], "hard")
        assert (found.classes.tolist(), found.probs.tolist()) == ([[3], [1], [9]], [[1], [1], [1]])


def test_the_most_probable_class_comes_first(folder):
    boxes, flips, _ = content("hard")
    labels = np.array([[[2, 8, 4, 1, 0], [0.1, 0.4, 0.2, 0.1, 0.05]]] * 3, np.float32)
    found = folder([boxes, flips, labels], "marginal_smoothing_k5")
    assert found.classes[0].tolist() == [8, 4, 2, 1, 0]


def test_class_numbers_that_half_precision_has_are_exact(folder):
    boxes, flips, _ = content("hard")
    labels = np.array([2048, 2047, 999], np.float16)
    assert folder([boxes, flips, labels], "hard", classes=2049).classes.tolist() == [[2048], [2047], [999]]
    with pytest.raises(QatError, match="float16, exact up to 2048, of 2050 classes"):
        folder([boxes, flips, labels], "hard", classes=2050)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda boxes, flips, labels: [boxes, flips], "holds no list of boxes, flips and labels"),
        (lambda boxes, flips, labels: 5, "holds no list of boxes, flips and labels"),
        (lambda boxes, flips, labels: [boxes[:, :3], flips, labels], r"boxes float32 \(3, 3\)"),
        (lambda boxes, flips, labels: [boxes, flips[:2], labels], r"flips bool \(2,\)"),
        (lambda boxes, flips, labels: [boxes, flips * 2.0, labels], r"flips float64 \(3,\)"),
        (lambda boxes, flips, labels: [boxes, flips, "none"], r"labels <U4 \(\)"),
        (lambda boxes, flips, labels: [boxes[:2], flips[:2], labels[:2]], "it has 2 crops, the store has 3"),
        (lambda boxes, flips, labels: [boxes, flips, labels[:, 0]], r"its labels are \(3, 5\), expected \(3, 2, 5\): "),
        (lambda boxes, flips, labels: [boxes * 2, flips, labels], "the box of crop 0"),
        (lambda boxes, flips, labels: [boxes, flips, labels + 0.5], "class 0.5 is not in 0..9"),
        (lambda boxes, flips, labels: [boxes, flips, labels + 1], "class 10.0 is not in 0..9"),
        (lambda boxes, flips, labels: [boxes, flips, labels * np.nan], "class nan is not in 0..9"),
        (lambda boxes, flips, labels: [boxes, flips, labels * [[1] * 5, [2] * 5]], "are not probabilities"),
        (lambda boxes, flips, labels: [boxes, flips, labels * [[1] * 5, [0] * 5]], "are not probabilities"),
        (lambda boxes, flips, labels: [boxes, flips, labels * [[1] * 5, [-1] * 5]], "are not probabilities"),
        (lambda boxes, flips, labels: [boxes, flips, labels * [[1, 0, 1, 1, 1]]], "the same class twice"),
    ],
)
def test_a_file_of_other_content_is_refused(change, message, folder, tmp_path):
    with pytest.raises(QatError, match=message) as caught:
        folder(change(*content("marginal_smoothing_k5")), "marginal_smoothing_k5")
    assert str(caught.value).startswith(f"{tmp_path / 'labels/ant/0.tar'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["imagenet/train", "train", "."])
def test_every_layout_of_a_set_is_found(layout, tmp_path):
    (tmp_path / layout / "bee").mkdir(parents=True)
    found = class_folder(tmp_path, ["ant", "bee"])
    assert found == tmp_path / layout
    assert LabelFolder(found, LABEL_TYPES["hard"], 2, True).file("bee/x.y.z.JPEG") == tmp_path / layout / "bee/x.tar"


def test_no_layout_at_all_is_refused(tmp_path):
    with pytest.raises(QatError, match=f"no folder of a class below {tmp_path}: .*{tmp_path}/imagenet/train/<class>, "):
        class_folder(tmp_path, ["ant", "bee"])


def test_missing_and_ambiguous_files_are_found_before_one_is_opened(tmp_path):
    (tmp_path / "ant").mkdir()
    for name in ("0", "1", "x"):
        (tmp_path / f"ant/{name}.tar").touch()
    labels = LabelFolder(tmp_path, LABEL_TYPES["hard"], 2, True)
    labels.check(["ant/0.png", "ant/1.a.png", "ant/x.png"])
    with pytest.raises(QatError, match=f"no label file {tmp_path}/ant/2.tar, nor those of 2 more of 4 images"):
        labels.check(["ant/0.png", "ant/2.png", "bee/0.png", "bee/1.png"])
    with pytest.raises(QatError, match=r"ant/x.a.png and ant/x.b.png both have the labels .*x.tar"):
        labels.check(["ant/x.a.png", "ant/x.b.png"])


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(QatError, match=f"cannot read {tmp_path}/0.png: not an image"):
        image_size(tmp_path / "0.png")
    with pytest.raises(QatError, match=f"cannot read {tmp_path}/1.png"):
        image_size(tmp_path / "1.png")
