"""The format of the store, read as another program would read it, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from qat.data.softlabels import opening
from qat.data.softlabels.opening import first_difference, open_store
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
        ({"top_k": 0}, r"topk is 0: choose 1\.\.3"),
        ({"top_k": 4}, r"topk is 4: choose 1\.\.3"),
        ({"label_type": "hard", "top_k": 2}, "topk is 2: hard labels are one class"),
        ({"num_crops": 0}, "crops is 0"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be positive"),
    ],
)
def test_labels_that_cannot_be_are_refused(changes, message: str) -> None:
    with pytest.raises(QatError, match=message):
        header(**changes)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def not_hdf5(path: Path) -> None:
    path.write_text("labels")


def foreign(path: Path) -> None:
    path.unlink()
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(3)


def newer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2


def without_seed(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs["seed"]


def other_encoding(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["value_encoding"] = "bf16"


def without_flips(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["flip"]


def other_shape(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["flip"]
        file["flip"] = np.zeros((10, 3), np.uint8)


def compressed(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        crops = file["crops"][:]
        del file["crops"]
        file.create_dataset("crops", data=crops, compression="gzip")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "no soft labels .*labels.h5: qat make-softlabels makes them"),
        (truncate, "cannot read the soft labels .*labels.h5: it is cut off"),
        (cut_in_half, "it is cut off"),
        (not_hdf5, "cannot read the soft labels .*labels.h5"),
        (foreign, "is not a store of soft labels: its attribute 'format' is None"),
        (newer, "has version 2 of the format, this version of qat reads 1"),
        (without_seed, "lacks the attribute 'seed'"),
        (other_encoding, "value_encoding is 'bf16', only 'f16_bits_u16'"),
        (without_flips, "lacks the data set 'flip'"),
        (other_shape, r"flip is uint8 \(10, 3\), expected uint8 \(10, 2\)"),
        (compressed, "crops is not contiguous; copy it with h5repack -l CONTI"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_file_is_refused_with_the_reason(store: Path, spoil, message: str) -> None:
    spoil(store)
    with pytest.raises(QatError, match=message):
        open_store(store)


def test_a_store_that_is_being_written_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "LOCK_SECONDS", 0.1)
    code = "import sys, h5py; file = h5py.File(sys.argv[1], 'r+'); print('locked', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(store)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(QatError, match="is being written by another process"):
            opening.open_store(store)
        process.communicate()
    opening.open_store(store).close()


@pytest.mark.parametrize(
    ("stored", "given", "words"),
    [
        (["a", "b"], ["a", "c"], "'c' is here where the labels have 'b'"),
        (["a"], ["a", "b"], "'b' is here where the labels have nothing"),
        (["a", "b"], ["a"], "nothing is here where the labels have 'b'"),
        (["a"], ["a"], "the stored hash is wrong"),
    ],
)
def test_the_first_difference_is_named(stored, given, words: str) -> None:
    assert words in first_difference(stored, given)
