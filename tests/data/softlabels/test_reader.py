"""Reading at random in many processes, and the checks before training."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from qat.data.softlabels.reader import SoftLabels
from qat.data.source import Source
from qat.errors import QatError
from tests.data.softlabels.stores import CLASSES, PATHS, header, labels_of, write


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
    return all(np.array_equal(a, b) for a, b in zip(ours, labels_of(index, header()), strict=True))  # type: ignore[call-overload]


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_labels_come_back_as_they_were_written(
    labels: SoftLabels, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "windows":
        for name in ("pread", "preadv"):
            monkeypatch.delattr(os, name, raising=False)
    found = {index: labels.read(index) for index in (9, 0, 4)}  # no read changes what was read before
    assert all(same(stored, index) for index, stored in found.items())
    some = np.array([10, 0, 7])
    for whole, part in zip(found[4][:4], labels.read(4, some)[:4], strict=True):
        assert np.array_equal(part, whole[some])


def test_it_travels_as_a_path_and_is_opened_where_it_is_read(labels: SoftLabels) -> None:
    labels.read(0)
    content = pickle.dumps(labels)
    assert len(content) < 2000  # no labels in it
    assert same(pickle.loads(content).read(3), 3)


def read_all(labels: SoftLabels, result: multiprocessing.Queue[tuple[int, bool]]) -> None:
    good = all(same(labels.read(index % 10), index % 10) for index in range(200))
    result.put((os.getpid(), good))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_many_processes_read_at_once(labels: SoftLabels, start: str) -> None:
    labels.read(0)  # opened before the fork
    context = multiprocessing.get_context(start)
    result = context.Queue()
    workers = [context.Process(target=read_all, args=(labels, result)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert all(same(labels.read(index % 10), index % 10) for index in range(200))
    found = [result.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert len(dict(found)) == 2
    assert all(good for _, good in found)


def test_a_file_that_became_shorter_is_noticed(labels: SoftLabels) -> None:
    os.truncate(labels.path, 2000)
    with pytest.raises(QatError, match=r"labels.h5 has become shorter"):
        labels.read(9)


# ---- checks before training


def test_labels_of_these_images_are_accepted(labels: SoftLabels, folder: Path) -> None:
    labels.check_images(Source(folder, PATHS), CLASSES)
    labels.check_finished(False)
    labels.check_crop_options({"scale": (0.08, 0.936), "flip": 0.5})
    assert str(labels).startswith("deit_tiny_patch16_224, 11 crops, top 2 of 3, ")


def test_labels_of_other_images_or_classes_are_refused_with_the_first_difference(
    labels: SoftLabels, folder: Path
) -> None:
    other = [*PATHS[:3], "a/new.JPEG", *PATHS[4:]]
    with pytest.raises(
        QatError, match=r"on other images than those of .*train: first, 'a/new.JPEG' is here .* 'a/é*3.JPEG'"
    ):
        labels.check_images(Source(folder, other), CLASSES)
    with pytest.raises(QatError, match=r"made on other classes: first, 'd' is here where the labels have 'c'"):
        labels.check_images(Source(folder, PATHS), ["a", "b", "d"])


def test_a_store_that_was_reordered_is_refused(labels: SoftLabels, folder: Path) -> None:
    with h5py.File(labels.path, "r+") as file:
        file["path"][:2] = file["path"][:2][::-1]
    with pytest.raises(QatError, match=r"labels\.h5 is damaged: its list 'path' has other names, or another order"):
        labels.check_images(Source(folder, PATHS), CLASSES)


def test_the_same_names_with_other_pixels_are_refused(labels: SoftLabels, folder: Path) -> None:
    Image.new("RGB", (22, 20)).save(folder / PATHS[0])
    with pytest.raises(QatError, match=r"0.JPEG: 22 x 20 pixels, but its soft labels were made on 44 x 40"):
        labels.check_images(Source(folder, PATHS), CLASSES)


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
        labels.read(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": (0.2, 1.0)}, "data.crop_scale is"),
        ({"ratio": (1.0, 1.0)}, "crop_ratio is"),
        ({"flip": 0.0}, "flip is"),
    ],
)
def test_crops_of_another_distribution_are_refused(labels: SoftLabels, given: dict[str, object], message: str) -> None:
    with pytest.raises(QatError, match=message):
        labels.check_crop_options(given)
