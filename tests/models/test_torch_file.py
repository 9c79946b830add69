"""Reading what torch.save wrote runs nothing, whatever the file asks for."""

from __future__ import annotations

import argparse
import builtins
import codecs
import collections
import copyreg
import enum
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qat.models.inert import Foreign, InertUnpickler
from qat.models.torch_file import is_program, read_foreign, read_plain, reason

RAN: list[str] = []


def run(*words: object) -> dict[str, object]:
    """What a malicious file would call."""
    RAN.append(str(words))
    return {}


class Called:
    """REDUCE: a function and its arguments."""

    def __reduce__(self):
        return run, ("reduce",)


class Built:
    """BUILD: an object whose __setstate__ runs."""

    def __getstate__(self):
        return {"a": 1}

    def __setstate__(self, state):
        run("setstate")


class Filled(dict):
    """SETITEMS on a class of its own, as yacs has it."""

    def __setitem__(self, key, value):
        run("setitem")
        super().__setitem__(key, value)


class Extended(list):
    """APPENDS on a class of its own."""

    def extend(self, items):
        run("extend")

    append = extend


class New:
    """NEWOBJ: __new__ runs."""

    def __new__(cls):
        run("new")
        return super().__new__(cls)


class NamedNew:
    """NEWOBJ_EX: __new__ runs with named arguments."""

    def __new__(cls, *, a):
        run("new")
        return super().__new__(cls)

    def __reduce__(self):
        return copyreg.__newobj_ex__, (NamedNew, (), {"a": 1})


class Colour(enum.Enum):
    """An enumeration is stored as a call."""

    RED = 1


class Nested:
    """A call whose argument is the result of a call."""

    def __reduce__(self):
        return run, (Called(), [Called(), {"a": Called()}])


class System:
    """A function of a module that torch blocks."""

    def __reduce__(self):
        return os.system, ("exit 1",)


def filled() -> Filled:
    table = Filled()
    dict.update(table, {"a": 1})
    return table


def extended() -> Extended:
    items = Extended()
    list.append(items, 1)
    return items


MALICIOUS = {
    "reduce": Called(),
    "build": Built(),
    "setitems": filled(),
    "appends": extended(),
    "new": New(),
    "new_ex": NamedNew(a=1),
    "enum": Colour.RED,
    "nested": Nested(),
    "system": System(),
}


@pytest.fixture(autouse=True)
def _ran():
    RAN.clear()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_runs_and_the_weights_are_read(tmp_path, name, zipped):
    weights = {"w": torch.arange(6.0).view(2, 3).t(), "h": torch.ones(2, dtype=torch.float16)}
    content = {"x": MALICIOUS[name], "model": weights, "y": [MALICIOUS[name]]}
    torch.save(content, tmp_path / "a.pth", pickle_protocol=2, _use_new_zipfile_serialization=zipped)
    RAN.clear()
    read = read_foreign(tmp_path / "a.pth")
    assert RAN == []
    assert all(torch.equal(read["model"][key], value) for key, value in weights.items())
    assert isinstance(read["x"], Foreign)
    assert isinstance(read["y"][0], Foreign)
    assert "\n" not in repr(read["x"])


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_of_pickle_is_inert(protocol, monkeypatch):
    for name, thing in MALICIOUS.items():
        data = pickle.dumps([thing, {"a": (1, "b", b"c", 2.5, None, True, {3})}], protocol)
        RAN.clear()
        first, plain = unpickled(data, monkeypatch)
        assert RAN == [], name
        assert isinstance(first, Foreign), name
        assert plain == {"a": (1, "b", b"c", 2.5, None, True, {3})}, name


def unpickled(data: bytes, monkeypatch: pytest.MonkeyPatch) -> object:
    """What the data holds; an error where reading it imports a module, but for a table of letters."""

    def no_import(name: str, *rest: object, **named: object) -> object:
        assert name.startswith("encodings"), name
        return original(name, *rest, **named)

    codecs.lookup("raw_unicode_escape")  # of the oldest protocol
    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_import)
    try:
        return InertUnpickler(io.BytesIO(data)).load()
    finally:
        monkeypatch.undo()


def test_the_state_of_a_function_is_not_changed():
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    called = InertUnpickler(io.BytesIO(code)).load()  # BUILD with (None, {"__defaults__": (1,)})
    assert called.__defaults__ is None
    assert torch._utils._rebuild_tensor_v2.__defaults__ != (1,)


def test_a_class_by_its_number_is_refused():
    for code in (b"\x80\x02\x82\x01.", b"\x80\x02\x83\x01\x00.", b"\x80\x02\x84\x01\x00\x00\x00."):
        with pytest.raises(pickle.UnpicklingError, match="by its number"):
            InertUnpickler(io.BytesIO(code)).load()


def test_what_training_files_hold_beside_weights_is_left_unread(tmp_path):
    content = {
        "model": collections.OrderedDict(w=torch.ones(2), p=torch.nn.Parameter(torch.zeros(3))),
        "args": argparse.Namespace(lr=0.1),
        "config": filled(),
        "best": np.float64(74.7),
        "path": Path("a"),
        "counts": collections.defaultdict(list, {1: [2]}),
    }
    torch.save(content, tmp_path / "a.pth")
    read = read_foreign(tmp_path / "a.pth")
    assert list(read["model"]) == ["w", "p"]
    assert torch.equal(read["model"]["p"], torch.zeros(3))
    names = {key: value.name for key, value in read.items() if isinstance(value, Foreign)}
    assert names["config"] == f"{__name__}.Filled"
    assert names["best"].endswith("multiarray.scalar")
    assert names["path"] in ("pathlib.PosixPath", "pathlib._local.PosixPath")
    assert names["counts"] == "collections.defaultdict"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_weights_of_every_protocol_are_read(tmp_path, protocol):
    weights = {"a": torch.tensor(3.0), "b": torch.zeros(0, 4), "c": torch.ones(2, dtype=torch.bfloat16)}
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "kept beside the weights"
    torch.save({"x": Called(), "w": weights, "p": marked}, tmp_path / "a.pth", pickle_protocol=protocol)
    RAN.clear()
    read = read_foreign(tmp_path / "a.pth")
    for name, value in weights.items():
        assert torch.equal(read["w"][name], value)
        assert read["w"][name].dtype == value.dtype
    assert torch.equal(read["p"], torch.ones(2))
    torch.save(weights, tmp_path / "a.pth", pickle_protocol=protocol)
    assert read_foreign(tmp_path / "a.pth").keys() == weights.keys()
    assert RAN == []


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    torch.save({"x": Called(), "w": torch.ones(2)}, tmp_path / "a.pth")
    out = tmp_path / "b.pth"
    with zipfile.ZipFile(tmp_path / "a.pth") as archive, zipfile.ZipFile(out, "w") as changed:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"K\x02\x85") == 1  # the size (2,)
                data = data.replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85")
            changed.writestr(name, data)
    with pytest.raises(pickle.UnpicklingError, match="larger than its storage"):
        read_foreign(out)


def test_a_plain_file_is_read_by_torch_alone_and_a_foreign_class_is_named_in_one_line(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    assert torch.equal(read_plain(tmp_path / "a.pth")["w"], torch.ones(2))
    torch.save({"w": torch.ones(2), "config": filled()}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError) as error:
        read_plain(tmp_path / "a.pth")
    text = reason(error.value)
    assert text.startswith(f"it holds a {__name__}.Filled, which is neither a tensor nor plain data")
    assert "\n" not in text
    assert "\x1b" not in text


def test_an_archive_of_torchscript_is_not_run(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="TorchScript"):
        read_foreign(tmp_path / "a.pt")
    assert is_program(tmp_path / "a.pt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.pt", "storages")
    assert is_program(tmp_path / "a.tar")
    for zipped in (True, False):
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert not is_program(tmp_path / "a.pth")
