"""Pickles of FKD: those of arrays are read, those that could run code and damaged ones are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.softlabels.fkd import LabelFolder, load
from qat.data.softlabels.fkd_label_types import LABEL_TYPES
from qat.errors import QatError


def content(dtype: type = np.float32) -> list[np.ndarray]:
    """Boxes, flips and labels of three crops, a class and its probability each."""
    return [np.array([[0.2, 0.4, 0.5, 0.26]] * 3, dtype), np.arange(3) % 2 == 0, np.array([[3, 0.62]] * 3, dtype)]


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_runs_only_when_trusted(is_zip, tmp_path):
    file, trace = tmp_path / "0.tar", tmp_path / "trace"
    torch.save([*content(), Evil(trace)], file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(QatError, match=r"it names \w+\.mkdir: reading it can run code .* trust_pickles true") as caught:
        load(file, trust_pickles=False)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    assert np.array_equal(load(file, trust_pickles=True)[0], content()[0])
    assert trace.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays_and_tensors_need_no_trust(dtype, is_zip, tmp_path):
    made = content(dtype)
    for parts in (made, [torch.from_numpy(part) for part in made]):
        torch.save(parts, tmp_path / "0.tar", _use_new_zipfile_serialization=is_zip)
        found = load(tmp_path / "0.tar", trust_pickles=False)
        assert all(map(np.array_equal, map(np.asarray, found), made))


def refusal(work: Callable[[], object]) -> str:
    """The message with which something is refused, or nothing."""
    try:
        work()
    except QatError as error:
        return str(error)
    return ""


def test_mutated_files_are_refused_in_one_line_or_read(tmp_path):
    rng, messages = np.random.default_rng(0), []
    Image.new("RGB", (50, 40)).save(tmp_path / "0.png")
    (tmp_path / "labels/ant").mkdir(parents=True)
    made = LabelFolder(tmp_path / "labels", LABEL_TYPES["smoothing"], 10, trust_pickles=False)
    file = tmp_path / "labels/ant/0.tar"
    for is_zip in (True, False):
        torch.save(content(), file, _use_new_zipfile_serialization=is_zip)
        good = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(60):
            bad = good.copy()
            places = rng.integers(0, len(bad), 8)
            bad[places] = rng.integers(0, 256, 8)
            file.write_bytes(bad.tobytes())
            messages.append(refusal(lambda: made.read("ant/0.png", tmp_path / "0.png", 3)))
    assert sum(map(bool, messages)) > 60
    assert all(str(file) in message and "\n" not in message for message in messages if message)


@pytest.mark.parametrize("trust", [True, False])
def test_a_damaged_or_missing_file_is_refused(trust, tmp_path):
    file = tmp_path / "0.tar"
    torch.save(content(), file)
    for damage in (file.read_bytes()[:-200], b"no pickle", b""):
        file.write_bytes(damage)
        with pytest.raises(QatError, match=f"cannot read {file}, .* replace it and run again") as caught:
            load(file, trust)
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(QatError, match=f"cannot read {file}"):
        load(file, trust)
