"""Files that are no stores, stores that are damaged, and those that another process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from qat.data.softlabels import opening
from qat.data.softlabels.opening import check_lists, first_difference, open_store
from qat.data.softlabels.store import sha256_of
from qat.errors import QatError
from tests.data.softlabels.stores import write


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(tmp_path / "labels.h5")
    return tmp_path / "labels.h5"


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


def empty(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for name in ("crops", "flip", "image_size", "target", "path", "done"):
            shape, dtype = file[name].shape, file[name].dtype
            del file[name]
            file.create_dataset(name, (0, *shape[1:]), dtype)


def in_another_file(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["crops"]
        file["crops"] = h5py.ExternalLink("other.h5", "crops")


def group_for_paths(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["path"]
        file.create_group("path")


def no_temperature(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["temperature"] = float("nan")


def text_for_crops(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["num_crops"] = "many"


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
        (in_another_file, "lacks the data set 'crops'"),
        (group_for_paths, "lacks the data set 'path'"),
        (empty, "labels.h5 is damaged: its data set 'done' is empty"),
        (no_temperature, "labels.h5 is damaged: attribute temperature is nan"),
        (text_for_crops, "labels.h5 is damaged: attribute num_crops is 'many'"),
        (other_shape, r"flip is uint8 \(10, 3\), expected uint8 \(10, 2\)"),
        (compressed, "crops is not contiguous; copy it with h5repack -l CONTI"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_file_is_refused_with_the_reason(store: Path, spoil, message: str) -> None:
    spoil(store)
    with pytest.raises(QatError, match=message):
        open_store(store)


def swapped(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            values = file[name][:]
            values[[0, -1]] = values[[-1, 0]]
            file[name][...] = values

    return spoil


def target_out_of_range(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["target"][2] = 3


def class_twice(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["class_name"][2] = b"a"
        file.attrs["class_list_sha256"] = sha256_of(["a", "b", "a"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swapped("path"), "labels.h5 is damaged: its list 'path' has other names, or another order, than path_list"),
        (swapped("class_name"), "its list 'class_name' has other names, or another order, than class_list"),
        (swapped("target"), "the target of 'a/0.JPEG' is 1, which is not its class"),
        (target_out_of_range, "the target of 'a/éé2.JPEG' is 3, which is not its class"),
        (class_twice, "its list 'class_name' has 'a' twice"),
    ],
    ids=["paths", "classes", "targets", "target out of range", "class twice"],
)
def test_lists_that_do_not_fit_each_other_are_refused(store: Path, spoil, message: str) -> None:
    with open_store(store) as file:
        check_lists(file, store)
    spoil(store)
    with open_store(store) as file, pytest.raises(QatError, match=message):
        check_lists(file, store)


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
        (["1", "10", "2"], ["1", "2", "10"], "as text, 10 before 2: make the labels again"),
        (["10/a", "2/a"], ["2/a", "10/a"], "as text, 10 before 2: make the labels again"),
    ],
)
def test_the_first_difference_is_named(stored, given, words: str) -> None:
    assert words in first_difference(stored, given)
