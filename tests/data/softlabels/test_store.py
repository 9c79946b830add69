"""The format of the store, read as another program would read it, and labels that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from qat.data.softlabels.opening import open_store
from qat.data.softlabels.store import Header, create, row_bytes, sha256_of
from qat.errors import QatError
from tests.data.softlabels.stores import CLASSES, PATHS, header, labels_of, write


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(tmp_path / "labels.h5")
    return tmp_path / "labels.h5"


def test_another_program_reads_it_with_hdf5_alone(store: Path) -> None:
    made = header()
    with h5py.File(store) as file:
        assert [name.decode() for name in file["path"]] == PATHS
        assert [name.decode() for name in file["class_name"]] == CLASSES
        assert h5py.check_string_dtype(file["path"].dtype) == ("utf-8", max(len(p.encode()) for p in PATHS))
        assert file["target"][:].tolist() == [0] * 5 + [1] * 5
        assert file["done"][:].tolist() == [1] * 10
        assert file["image_size"][:].tolist() == [[40, 44]] * 10
        for index in range(10):
            expected, crops = labels_of(index, made), file["crops"][index]
            assert np.array_equal(crops[:, :4], expected.boxes)
            assert np.array_equal(crops[:, 4:6], expected.classes)
            assert np.array_equal(crops[:, 6:].copy().view(np.float16), expected.probs)
            flips = [bool(file["flip"][index][i // 8] >> (i % 8) & 1) for i in range(11)]
            assert flips == expected.flips.tolist()
        assert dict(file.attrs)["format"] == "qat-softlabels"


def test_attributes_come_back_as_they_were(store: Path) -> None:
    with open_store(store) as file:
        assert Header.from_attrs(file.attrs, store) == header()


def test_hashes_are_those_of_the_documentation() -> None:
    # printf 'a\nb\n' | sha256sum
    assert sha256_of(["a", "b"]) == "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2"


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    name = os.fsdecode(b"a/\xff.jpg")
    with pytest.raises(QatError, match=r"the name 'a/\\udcff.jpg' cannot be stored because it is not UTF-8"):
        create(tmp_path / "labels.h5", header([name]), [name], CLASSES, "tests")


def test_all_space_is_laid_out_before_the_first_label(tmp_path: Path) -> None:
    path = tmp_path / "empty.h5"
    create(path, header(), PATHS, CLASSES, "tests")
    size = path.stat().st_size
    assert size > 10 * row_bytes(header())
    with open_store(path) as file:
        assert not file["done"][:].any()
    write(tmp_path / "full.h5")
    assert (tmp_path / "full.h5").stat().st_size == size


def test_a_crop_takes_at_most_29_bytes_at_500_crops_of_5_classes() -> None:
    assert row_bytes(header(num_crops=500, top_k=5, classes=list("abcdefgh"))) == 14_063


def test_two_stores_of_the_same_labels_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one.h5")
    write(tmp_path / "two.h5", rows=range(9, -1, -1))
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_it_is_in_the_old_format_that_can_be_opened_after_a_kill(store: Path) -> None:
    assert store.read_bytes()[8] == 0  # version of the superblock: no mark for "open for writing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_type": "soft"}, "label_type is 'soft': choose from"),
        ({"top_k": 0}, "attribute top_k is 0: give an integer of at least 1"),
        ({"top_k": 4}, r"topk is 4: choose 1\.\.3"),
        ({"label_type": "hard", "top_k": 2}, "topk is 2: hard labels are one class"),
        ({"num_crops": 0}, "num_crops is 0"),
        ({"temperature": 0.0}, "attribute temperature is 0.0: give a number above 0"),
        ({"num_crops": 65537}, "attribute num_crops is 65537: give an integer from 1 to"),
        ({"teacher": 3}, "attribute teacher is 3: give text"),
    ],
)
def test_labels_that_cannot_be_are_refused(changes, message: str) -> None:
    with pytest.raises(QatError, match=message):
        header(**changes)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("boxes", (0, 0, 41, 3), "a box, a class or a probability is impossible"),
        ("boxes", (0, 0, 0, 3), "a box, a class or a probability is impossible"),
        ("classes", (1, 3), "a box, a class or a probability is impossible"),
        ("classes", (1, 1), "a crop has the same class twice"),
        ("probs", (0.8, np.nan), "a box, a class or a probability is impossible"),
        ("probs", (1.1, 0), "a box, a class or a probability is impossible"),
        ("probs", (0.9, 0.2), "the probabilities of a crop sum to more than 1"),
    ],
)
def test_labels_that_no_writer_makes_are_refused(part: str, value: tuple[float, ...], message: str) -> None:
    labels = labels_of(0, header())
    labels.check(3)
    getattr(labels, part)[4] = value
    with pytest.raises(QatError, match=message):
        labels.check(3)


def test_sums_that_half_precision_brings_above_1_are_no_error() -> None:
    labels = labels_of(0, header(top_k=3))
    probs = np.float16([0.3335, 0.3335, 0.3335])
    assert probs.sum(dtype=np.float64) > 1
    labels.probs[:] = probs
    labels.check(3)
