"""One reader for all: file, card and weights, each problem in one line with its name."""

from __future__ import annotations

import math
import time
import zipfile
from dataclasses import replace

import pytest
import torch

import qat
from qat import checkpoint
from qat.checkpoint import AVERAGED, Card, check_restored, load_into
from qat.errors import QatError
from qat.models import default_preprocessing
from qat.training.teacher import build_teacher
from tests.checkpoint.saved import ARCH, TINY, make, write


@pytest.fixture
def saved():
    return make()


STEP, WEIGHT = "model.blocks.0.attn.qkv.weight_quant.step", "model.blocks.0.norm1.weight"
DAMAGES = {
    "missing": (lambda s: s.pop(WEIGHT), r"does not fit the model: 1 missing \(blocks.0.norm1.weight\)"),
    "unexpected": (lambda s: s.update({"model.x": torch.ones(1)}), r"1 unexpected \(x\)"),
    "without prefix": (lambda s: s.update({"other": torch.ones(1)}), r"1 unexpected \(other\)"),
    "shape": (
        lambda s: s.update({WEIGHT: torch.ones(23)}),
        r"1 of another shape or type \('blocks.0.norm1.weight': \(23,",
    ),
    "complex": (lambda s: s.update({WEIGHT: torch.ones(24) * 1j}), r"'blocks.0.norm1.weight': \(24,\) complex64, not"),
    "integer": (lambda s: s.update({WEIGHT: torch.ones(24, dtype=torch.int64)}), r"\(24,\) int64, not \(24,\) float32"),
    "no tensor": (lambda s: s.update({WEIGHT: 3.0}), "'blocks.0.norm1.weight': a float, not"),
    "NaN": (lambda s: s[WEIGHT].fill_(math.nan), "24 of the 24 numbers in 'blocks.0.norm1.weight' are not finite"),
    "infinite": (lambda s: s[WEIGHT][:1].fill_(math.inf), "1 of the 24 numbers in 'blocks.0.norm1.weight'"),
    "NaN step": (lambda s: s[STEP].fill_(math.nan), "in 'blocks.0.attn.qkv.weight_quant.step' are not finite"),
    "negative step": (lambda s: s[STEP].neg_(), r"a step of 'blocks.0.attn.qkv.weight_quant' is -\d"),
    "step of zero": (
        lambda s: s[STEP].zero_(),
        "a step of 'blocks.0.attn.qkv.weight_quant' is 0, and steps are above 0",
    ),
    "a number for a name": (lambda s: s.update({3: torch.ones(1)}), "a name in 'state_dict' is not text"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_reader_says_the_same_of_damaged_weights(saved, tmp_path, name):
    model, content = saved
    card = Card.from_dict(content["qat"], "a")
    damage, message = DAMAGES[name]
    content["state_dict"] = {key: value.clone() for key, value in content["state_dict"].items()}
    damage(content["state_dict"])
    path = write(content, tmp_path / "a.ckpt")
    lines = set()
    for read in (
        lambda: checkpoint.read(path),
        lambda: qat.load(path),
        lambda: checkpoint.load_into(model, card, path),
    ):
        with pytest.raises(QatError, match=f"a.ckpt.*{message}") as error:
            read()
        lines.add(str(error.value))
    assert len(lines) == 1
    with pytest.raises(QatError, match=f"^model.teacher: .*{message}"):
        build_teacher(ARCH, path, 3)
    with pytest.raises(QatError, match=f"^the checkpoint.*{message}"):
        check_restored(content, card, model, resumes=False, averages=False)


def test_the_weights_behind_an_average_are_checked_too(saved, tmp_path):
    _, content = saved
    content[AVERAGED] = {name: value for name, value in content["state_dict"].items() if name != WEIGHT}
    with pytest.raises(QatError, match=r"a.ckpt, current_model_state does not fit the model: 1 missing"):
        checkpoint.read(write(content, tmp_path / "a.ckpt"))


@pytest.mark.parametrize("table", [None, [], "weights"], ids=str)
def test_a_checkpoint_without_weights(saved, tmp_path, table):
    _, content = saved
    content["state_dict"] = table
    with pytest.raises(QatError, match=r"a.ckpt has no table of weights 'state_dict'"):
        checkpoint.read(write(content, tmp_path / "a.ckpt"))
    del content["state_dict"]
    with pytest.raises(QatError, match=r"a.ckpt has no table of weights 'state_dict'"):
        qat.load(write(content, tmp_path / "a.ckpt"))


@pytest.mark.parametrize(
    "change", [{"depth": 900}, {"embed_dim": 60_000}, {"img_size": 4096, "patch_size": 1}, {"num_heads": 5}], ids=str
)
def test_a_card_that_asks_for_another_model_is_refused_without_building_it(saved, tmp_path, change):
    _, content = saved
    content["qat"]["model_args"] = {**TINY, **change}
    content["qat"]["preprocessing"] = default_preprocessing(ARCH, content["qat"]["model_args"]).to_dict()
    path = write(content, tmp_path / "a.ckpt")
    started = time.process_time()
    with pytest.raises(QatError, match=r"a.ckpt(: the model that its card describes cannot be built| does not fit)"):
        checkpoint.read(path)
    assert time.process_time() - started < 1


def test_files_that_are_none_of_ours(tmp_path, saved):
    missing = tmp_path / "none.ckpt"
    with pytest.raises(QatError, match=r"no checkpoint .*none.ckpt: --ckpt takes a file that qat wrote"):
        checkpoint.read(missing)
    with pytest.raises(QatError, match=r"no checkpoint .*: --ckpt takes a file"):
        checkpoint.read(tmp_path)
    for content in ([1], {"state_dict": {}}, torch.zeros(2)):
        with pytest.raises(QatError, match=r"was not written by qat; float weights are given as --model.checkpoint"):
            checkpoint.read(write(content, tmp_path / "a.ckpt"))
    for data in (b"", b"<html>", b"PK\x03\x04", b"\x80\x02."):
        (tmp_path / "a.ckpt").write_bytes(data)
        with pytest.raises(QatError, match=r"cannot read the checkpoint .*a.ckpt|a.ckpt is (empty|no file)") as error:
            checkpoint.read(tmp_path / "a.ckpt")
        assert "\n" not in str(error.value)


def test_a_bit_that_flipped_in_a_weight_is_noticed(saved, tmp_path):
    path = write(saved[1], tmp_path / "a.ckpt")
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[record.header_offset + 400] ^= 1  # a low bit of a weight: the value is still a number
    path.write_bytes(data)
    with pytest.raises(QatError, match=r"cannot read the checkpoint .*a.ckpt: .*/data/\d+ has another checksum"):
        checkpoint.read(path)


def test_a_class_in_a_checkpoint_is_named_and_not_read(saved, tmp_path):
    content = {**saved[1], "callbacks": {"Mine": object.__new__(Left)}}
    with pytest.raises(QatError, match=r"it holds a .*Left, which is neither a tensor nor plain data") as error:
        checkpoint.read(write(content, tmp_path / "a.ckpt"))
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


class Left:
    """An object that a callback left in a checkpoint."""


def test_a_checkpoint_of_another_name_is_found_to_be_none(tmp_path, saved):
    assert checkpoint.find_card(write({"a": torch.ones(1)}, tmp_path / "a.ckpt")) is None
    assert checkpoint.find_card(write(saved[1], tmp_path / "a.pth")) is None
    assert checkpoint.find_card(write(saved[1], tmp_path / "a.CKPT")).arch == ARCH


def test_a_calibration_fits_where_other_rules_say_the_same(saved, tmp_path):
    model, content = saved
    path, card = write(content, tmp_path / "ptq.ckpt"), Card.from_dict(content["qat"], "a.ckpt")
    unused = {"match": "*.mlp_out_proj.input_quant", "spec": None, "optional": True}
    load_into(model, replace(card, rules=[*card.rules, unused]), path)
    with pytest.raises(
        QatError, match=r"with LSQ.* at 'head.input_quant', and here it is floating point: give the bits"
    ):
        load_into(model, replace(card, rules=[*card.rules, {"match": "head*", "spec": None}]), path)


def test_a_calibration_serves_the_same_architecture_with_another_tag(saved, tmp_path):
    model, content = saved
    path, card = write(content, tmp_path / "ptq.ckpt"), Card.from_dict(content["qat"], "a.ckpt")
    load_into(model, replace(card, arch=f"{ARCH}.fb_in1k"), path)
    with pytest.raises(QatError, match=f"arch is '{ARCH}' there and 'deit_small_patch16_224' here: give the options"):
        load_into(model, replace(card, arch="deit_small_patch16_224"), path)
    with pytest.raises(QatError, match="num_classes is 3 there and 4 here"):
        load_into(model, replace(card, num_classes=4, classes=[]), path)


def test_the_way_out_names_the_values_that_a_calibration_was_made_with(saved, tmp_path):
    model, content = saved
    path, card = write(content, tmp_path / "ptq.ckpt"), Card.from_dict(content["qat"], "a.ckpt")
    resize = card.preprocessing["resize"]
    for change, words in (
        ({"preprocessing": card.preprocessing | {"resize": 77}}, f"with --data.preprocessing.resize {resize}: give"),
        (
            {"classes": card.classes[::-1]},
            "their order is 'class 0, class 1, class 2', ...: give it as",
        ),
        ({"classes": ["a", "b", "c"]}, "classes differs from this one: give the options"),
    ):
        with pytest.raises(QatError, match=words):
            load_into(model, replace(card, **change), path)
