"""Reading at random in many processes, the order of the crops, and what is checked before training."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.crops import Crop, replay
from qat.data.softlabels.reader import ReplayView, SoftLabels, chosen, recover
from qat.errors import QatError
from qat.training.losses import sparse_soft_cross_entropy
from tests.data.softlabels.stores import CLASSES, PATHS, header, row, write

WORKED = np.array([[3, 7, 0, 9, 2]], np.uint16), np.array([[0.62, 0.15, 0.08, 0.05, 0.02]], np.float16)


@pytest.fixture
def labels(tmp_path: Path) -> SoftLabels:
    write(tmp_path / "labels.h5")
    return SoftLabels(tmp_path / "labels.h5")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in PATHS:
        (tmp_path / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (44, 40)).save(tmp_path / "train" / path)
    return tmp_path / "train"


def same(ours: object, index: int) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, row(index, header()), strict=True))  # type: ignore[call-overload]


def test_a_row_comes_back_as_it_was_written(labels: SoftLabels) -> None:
    assert all(same(labels.row(index), index) for index in (9, 0, 4))


def test_it_travels_as_a_path_and_is_opened_where_it_is_read(labels: SoftLabels) -> None:
    labels.row(0)
    content = pickle.dumps(labels)
    assert len(content) < 2000  # no labels in it
    assert same(pickle.loads(content).row(3), 3)


def read_all(labels: SoftLabels, result: multiprocessing.Queue[tuple[int, bool]]) -> None:
    good = all(same(labels.row(index % 10), index % 10) for index in range(200))
    result.put((os.getpid(), good))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_many_processes_read_at_once(labels: SoftLabels, start: str) -> None:
    labels.row(0)  # opened before the fork
    context = multiprocessing.get_context(start)
    result = context.Queue()
    workers = [context.Process(target=read_all, args=(labels, result)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert all(same(labels.row(index % 10), index % 10) for index in range(200))
    found = [result.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert len(dict(found)) == 3
    assert all(good for _, good in found)


def test_a_file_that_became_shorter_is_noticed(labels: SoftLabels) -> None:
    os.truncate(labels.path, 2000)
    with pytest.raises(QatError, match=r"labels.h5 has become shorter"):
        labels.row(9)


# ---- which crops


@pytest.mark.parametrize(("crops", "visits"), [(11, [4, 4, 4, 1, 1, 4, 4]), (8, [4] * 6), (3, [4, 4, 1])])
def test_no_crop_comes_again_before_all_were_used(crops: int, visits: list[int]) -> None:
    seen, before = [], 0
    for count in visits:
        seen += chosen(5, 2, crops, before, count).tolist()
        before += count
    for turn in range(0, len(seen), crops):
        part = seen[turn : turn + crops]
        assert max(Counter(part).values()) == 1
        assert turn + crops > len(seen) or sorted(part) == list(range(crops))


def test_the_order_depends_on_seed_image_and_what_was_used_alone() -> None:
    first = chosen(0, 0, 500, 8, 4).tolist()
    assert first == chosen(0, 0, 500, 8, 4).tolist()
    assert first == chosen(0, 0, 500, 0, 12)[8:].tolist()
    assert first not in [chosen(*key, 500, before, 4).tolist() for *key, before in ((1, 0, 8), (0, 1, 8), (0, 0, 12))]
    assert chosen(0, 0, 500, 8, 4).tolist() != chosen(0, 0, 500, 508, 4).tolist()


# ---- labels


def test_marginal_smoothing_and_its_loss_by_hand() -> None:
    recovered = recover(header(num_classes=10, top_k=5), *WORKED)
    logits = torch.tensor([[0.1, -0.4, 0.3, 2.0, 0.0, -1.0, 0.5, 1.2, -0.2, 0.7]])
    assert recovered.classes.tolist() == [[3, 7, 0, 9, 2]]
    # half precision rounds the probabilities by up to 1.2e-4
    assert sparse_soft_cross_entropy(logits, recovered).item() == pytest.approx(1.5283861555, abs=3e-4)


def test_marginal_renorm_by_hand() -> None:
    recovered = recover(header(num_classes=10, top_k=5, label_type="marginal_renorm"), *WORKED)
    expected = torch.tensor([[0.6739130, 0.1630435, 0.0869565, 0.0543478, 0.0217391]])
    torch.testing.assert_close(recovered.probs, expected, atol=2e-4, rtol=0)  # half precision
    assert recovered.probs.sum().item() == pytest.approx(1, abs=1e-6)


def test_hard_labels_are_one_class() -> None:
    made = header(num_classes=10, top_k=1, label_type="hard")
    recovered = recover(made, WORKED[0][:, :1], WORKED[1][:, :1])
    logits = torch.randn(1, 10)
    loss = sparse_soft_cross_entropy(logits, recovered)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([3])).item(), abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_one_class_and_all_classes_are_stored_too(k: int, tmp_path: Path) -> None:
    made = write(tmp_path / "labels.h5", top_k=k)
    stored = SoftLabels(tmp_path / "labels.h5").row(4)
    assert np.array_equal(stored.probs, row(4, made).probs)
    assert recover(made, stored.classes, stored.probs).probs.shape == (11, k)


# ---- replay


def test_replay_gives_the_stored_crops_with_their_labels(labels: SoftLabels) -> None:
    image = torch.randint(0, 256, (3, 40, 44), dtype=torch.uint8)
    view = ReplayView(labels, np.array([7, 3]), 16, "bilinear", 4, seed=1, before=8)
    out = torch.empty(4, 3, 16, 16, dtype=torch.uint8)
    soft_labels = view(image, 1, out)
    stored, order = row(3, header()), chosen(1, 3, 11, 8, 4)
    for place, crop in enumerate(order):
        box = Crop(*stored.boxes[crop].tolist(), bool(stored.flips[crop]))
        assert torch.equal(out[place], replay(image, [box], 16, "bilinear")[0])
    assert soft_labels.classes.tolist() == stored.classes[order].tolist()
    assert soft_labels.probs.tolist() == stored.probs[order].astype(np.float32).tolist()
    with pytest.raises(QatError, match="50 x 40 pixels, but its soft labels were made on 44 x 40"):
        view(torch.zeros(3, 40, 50, dtype=torch.uint8), 0, out)


@pytest.mark.parametrize("column", [2, 4, 6])
def test_damaged_rows_are_not_trained_on(tmp_path: Path, column: int) -> None:
    import h5py

    write(tmp_path / "labels.h5")
    with h5py.File(tmp_path / "labels.h5", "r+") as file:
        crops = file["crops"][0]
        crops[:, column] = {2: 0, 4: 3, 6: 0x7E00}[column]  # no height, no such class, NaN
        file["crops"][0] = crops
    view = ReplayView(SoftLabels(tmp_path / "labels.h5"), np.arange(10), 16, "bilinear", 4, 0, 0)
    with pytest.raises(QatError, match="its soft labels are damaged"):
        view(torch.zeros(3, 40, 44, dtype=torch.uint8), 0, torch.empty(4, 3, 16, 16, dtype=torch.uint8))


# ---- checks before training


def test_labels_of_these_images_are_accepted(labels: SoftLabels, folder: Path) -> None:
    labels.check_images(folder, PATHS, CLASSES)
    labels.check_finished(False)
    labels.check_law({"scale": (0.08, 0.936), "flip": 0.5})
    assert str(labels).startswith("deit_tiny_patch16_224, 11 crops, top 2 of 3, ")


def test_labels_of_other_images_or_classes_are_refused_with_the_first_difference(
    labels: SoftLabels, folder: Path
) -> None:
    other = [*PATHS[:3], "a/new.JPEG", *PATHS[4:]]
    with pytest.raises(QatError, match=r"of other images than .*train: first, 'a/new.JPEG' is here .* 'a/é*3.JPEG'"):
        labels.check_images(folder, other, CLASSES)
    with pytest.raises(QatError, match=r"of other classes: first, 'd' is here where the labels have 'c'"):
        labels.check_images(folder, PATHS, ["a", "b", "d"])


def test_the_same_names_with_other_pixels_are_refused(labels: SoftLabels, folder: Path) -> None:
    Image.new("RGB", (22, 20)).save(folder / PATHS[0])
    with pytest.raises(QatError, match=r"0.JPEG: 22 x 20 pixels, but its soft labels were made on 44 x 40"):
        labels.check_images(folder, PATHS, CLASSES)


@pytest.mark.parametrize(
    ("done", "partial", "refused"), [([1, 2], False, True), ([1, 2], True, False), ([], True, True)]
)
def test_an_unfinished_store_is_used_only_when_asked_for(
    tmp_path: Path, done: list[int], partial: bool, refused: bool
) -> None:
    write(tmp_path / "labels.h5", rows=done)
    labels = SoftLabels(tmp_path / "labels.h5")
    if refused:
        with pytest.raises(QatError, match=f"is not finished, {len(done)} of 10 images have labels"):
            labels.check_finished(partial)
    else:
        labels.check_finished(partial)
    with pytest.raises(QatError, match="has no labels yet for image 0"):
        labels.row(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": (0.2, 1.0)}, "data.crop_scale is"),
        ({"ratio": (1.0, 1.0)}, "crop_ratio is"),
        ({"flip": 0.0}, "flip is"),
    ],
)
def test_crops_of_another_law_are_refused(labels: SoftLabels, given: dict[str, object], message: str) -> None:
    with pytest.raises(QatError, match=message):
        labels.check_law(given)
