"""The card: every field has a type and a range, and what it says is checked before a model is built."""

from __future__ import annotations

import copy
import math
import sys
import time

import pytest
import torch

from qat import checkpoint
from qat.checkpoint import Card
from qat.errors import QatError
from qat.training.options import ModelOptions
from qat.training.student import build_student
from tests.checkpoint.saved import ARCH, TINY, make, write
from tests.own_quantizer import own_quantizer

LACKS = "its card lacks"


@pytest.fixture(scope="module")
def stored():
    return make()[1]["qat"]


def test_a_card_and_plain_data_turn_into_each_other(stored):
    card = Card.from_dict(stored, "a.ckpt")
    assert card.to_dict() == stored
    assert Card.from_dict({**stored, "options": {}, "calibration": {}}, "a.ckpt") == card


@pytest.mark.parametrize("content", [None, [], "card", 3, torch.zeros(2)], ids=str)
def test_a_card_that_is_no_mapping(content):
    with pytest.raises(QatError, match=r"^a.ckpt: its card is a \w+, not a mapping"):
        Card.from_dict(content, "a.ckpt")


@pytest.mark.parametrize("number", [None, 0, 2, "1", 1.0, True, [1], math.nan, torch.ones(3)], ids=str)
def test_another_format(stored, number):
    with pytest.raises(QatError, match=r"^a.ckpt has format .*, this version of qat reads format 1"):
        Card.from_dict({**stored, "format": number}, "a.ckpt")


@pytest.mark.parametrize("name", ["arch", "model_args", "num_classes", "rules", "preprocessing", "classes"])
def test_a_field_that_is_missing_or_null(stored, name):
    with pytest.raises(QatError, match=f"^a.ckpt: its card lacks '{name}'"):
        Card.from_dict({key: value for key, value in stored.items() if key != name}, "a.ckpt")
    with pytest.raises(QatError, match=f"^a.ckpt: {name} is None: give "):
        Card.from_dict({**stored, name: None}, "a.ckpt")


MALFORMED = {
    "an arch that timm lacks": ({"arch": "deit_tinny"}, "timm .* has no model 'deit_tinny'; similar names: deit_tiny"),
    "an arch elsewhere": ({"arch": "hf-hub:a/b"}, "arch is 'hf-hub:a/b', which needs another file"),
    "no arch": ({"arch": 3}, "arch is 3: give text"),
    "classes as text": ({"num_classes": "3"}, "num_classes is '3': give an integer"),
    "no classes": ({"num_classes": 0}, "num_classes is 0: give an integer from 2"),
    "NaN classes": ({"num_classes": math.nan}, "num_classes is nan"),
    "too few names": ({"classes": ["a"]}, "1 names of classes, but num_classes is 3"),
    "a name twice": ({"classes": ["a", "b", "a"]}, "the class 'a' is named twice"),
    "names that are numbers": ({"classes": [1, 2, 3]}, "classes is .*each item text"),
    "rules as a mapping": ({"rules": {"a": 1}}, "rules is .*give a list"),
    "a rule as text": ({"rules": ["LSQ"]}, "rules is .*each item a mapping"),
    "a tensor": ({"classes": torch.zeros(3)}, "classes holds a Tensor, and it holds plain data only"),
    "a number as a name": ({"model_args": {1: 2}}, "model_args has a key that is a int, not text"),
    "preprocessing as a list": ({"preprocessing": [1]}, "preprocessing is .*give a mapping"),
    "a million layers": ({"model_args": {**TINY, "depth": 1_000_000}}, "model_args.depth is 1000000: give"),
    "weights elsewhere": ({"model_args": {"checkpoint_path": "/a.pth"}}, "model_args.checkpoint_path is '/a.pth'"),
    "pretrained weights": ({"model_args": {"pretrained": True}}, "model_args.pretrained is True"),
    "other weights": ({"model_args": {"pretrained_cfg": "x"}}, "model_args.pretrained_cfg is 'x'"),
    "classes twice": ({"model_args": {"num_classes": 3}}, "model_args.num_classes is 3: set it by"),
    "drop path": ({"model_args": {"drop_path_rate": 0.1}}, "model_args.drop_path_rate is 0.1: set it by"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_value_that_no_model_can_have(stored, name):
    changes, message = MALFORMED[name]
    with pytest.raises(QatError, match=f"^a.ckpt: {message}") as error:
        Card.from_dict({**stored, **changes}, "a.ckpt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": None}, "size"),
        ({"size": "32"}, "preprocessing.size is '32'"),
        ({"size": 32.5}, "preprocessing.size is 32.5"),
        ({"resize": 10}, "preprocessing.size is 32: give at most"),
        ({"mean": [math.nan] * 3}, r"preprocessing.mean is \[nan"),
        ({"mean": [0.5, 0.5]}, r"preprocessing.mean is \[0.5, 0.5\]"),
        ({"std": [0.5, 0, 0.5]}, "preprocessing.std is"),
        ({"interpolation": "cubic"}, "preprocessing.interpolation is 'cubic'"),
        ({"crop": 1}, "preprocessing has no option 'crop'"),
        ({"size": 24}, "preprocessing.size is 24, but the model takes 32 pixels"),
    ],
)
def test_preprocessing_is_complete_and_in_its_ranges(stored, changes, message):
    plain = {**stored["preprocessing"], **changes}
    with pytest.raises(QatError, match=f"^a.ckpt: .*{message}"):
        Card.from_dict({**stored, "preprocessing": plain}, "a.ckpt")
    del plain["size"]
    plain.pop("crop", None)
    with pytest.raises(QatError, match=r"preprocessing lacks 'size'"):
        Card.from_dict({**stored, "preprocessing": plain}, "a.ckpt")


def with_spec(stored, **changes):
    card = copy.deepcopy(stored)
    card["rules"][0]["spec"] |= {key: value for key, value in changes.items() if key == "class_path"}
    card["rules"][0]["spec"]["init_args"] |= {key: value for key, value in changes.items() if key != "class_path"}
    return card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": "w_bits"}, "bits is the word 'w_bits', not a width"),
        ({"bits": 99}, "bits is 99: give 2 to 16"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"signed": "yes"}, "signed is 'yes': give true or false"),
        ({"no_such": 1}, "LSQ has no option 'no_such'"),
        ({"class_path": "Nothing"}, "no quantizer is called 'Nothing'"),
        ({"class_path": 3}, "class_path is 3"),
        ({"class_path": "antigravity.fly"}, "quantizer 'antigravity.fly' is no part of qat.*--trust"),
        ({"class_path": "os.system"}, "quantizer 'os.system' is no part of qat.*--trust"),
    ],
)
def test_a_rule_names_a_known_quantizer_with_known_options(stored, changes, message):
    with pytest.raises(QatError, match=f"^a.ckpt: rule .*: {message}"):
        Card.from_dict(with_spec(stored, **changes), "a.ckpt")
    assert "antigravity" not in sys.modules


def test_deep_and_large_values_are_refused_at_once(stored):
    deep: list[object] = []
    for _ in range(200_000):
        deep = [deep]
    laughing: list[object] = ["ha"] * 1000  # a few thousand bytes in a file, and 10**18 entries
    for _ in range(5):
        laughing = [laughing] * 1000
    large = {"deep": deep, "wide": [0.5] * 1_000_000, "long": "x" * 10_000_000, "laughing": laughing}
    started = time.process_time()
    for value in large.values():
        for name in ("arch", "num_classes", "model_args", "classes"):
            stated = {"embed_dim": value} if name == "model_args" else value
            with pytest.raises(QatError) as error:
                Card.from_dict({**stored, name: stated}, "a.ckpt")
            assert len(str(error.value)) < 500
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "argument", [{"checkpoint_path": "a.pth"}, {"pretrained": True}, {"drop_path_rate": 0.1}], ids=str
)
def test_a_card_that_another_file_would_complete_is_never_written(argument):
    with pytest.raises(QatError, match=rf"model.model_args.{next(iter(argument))} is .*: set it by model\."):
        build_student(ModelOptions(arch=ARCH, checkpoint=None, num_classes=3, model_args={**TINY, **argument}))


def test_a_card_that_no_reader_would_take_is_never_written():
    with pytest.raises(QatError, match=r"^model: 2 names of classes, but num_classes is 3"):
        build_student(ModelOptions(arch=ARCH, checkpoint=None, num_classes=3, model_args=TINY, classes=["a", "b"]))


def test_reading_a_checkpoint_imports_what_it_names_only_when_it_is_trusted(tmp_path, monkeypatch):
    spec = own_quantizer(tmp_path, monkeypatch, "outside_of_a_card", bits=4)
    _, content = make()
    content["qat"]["rules"].append({"match": "blocks.0.mlp.fc1.weight_quant", "spec": spec})
    path = write(content, tmp_path / "a.ckpt")
    for read in (checkpoint.read, checkpoint.load, checkpoint.find_card):
        with pytest.raises(QatError, match=r"a.ckpt: rule .*'outside_of_a_card.Mine' is no part of qat.*--trust"):
            read(path)
    assert not (tmp_path / "imported").exists()
    model = checkpoint.load(path, trust=True)
    assert (tmp_path / "imported").exists()
    assert type(model.blocks[0].mlp.fc1.weight_quant.spec).__name__ == "Mine"
    assert checkpoint.read(path)[0].rules == content["qat"]["rules"]  # imported by now: reading it runs nothing
