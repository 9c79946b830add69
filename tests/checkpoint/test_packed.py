"""Packed checkpoints: the same model from a fraction of the bytes, and no byte of it changed."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qat
from qat import build_float, build_recipe, calibrate, checkpoint, quantize
from qat.checkpoint import Card
from qat.checkpoint.packed import is_packed, packed_state, read_packed, write_packed
from qat.errors import QatError
from qat.models import default_preprocessing
from qat.quantizers import LSQ, LSQQuantizer
from qat.quantizers.layout import Layout
from tests.checkpoint.saved import ARCH, TINY, make


@pytest.fixture(scope="module")
def saved():
    return make()


@pytest.fixture
def packed(saved, tmp_path):
    model, content = saved
    path = tmp_path / "a.safetensors"
    write_packed(path, model, Card.from_dict(content["qat"], "a"), content)
    return path


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_the_checkpoint_to_the_bit(saved, packed):
    model, content = saved
    again = qat.load(packed)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
    card, found = checkpoint.read(packed)
    assert card == Card.from_dict(content["qat"], "a")
    assert found["state_dict"].keys() == content["state_dict"].keys()
    assert checkpoint.find_card(packed) == card


def test_the_layout_is_the_one_that_is_written_down(saved, packed):
    model, _ = saved
    layer = model.blocks[0].attn.qkv
    tensors = load_file(packed)
    stream = tensors["blocks.0.attn.qkv.weight_codes"]
    assert "blocks.0.attn.qkv.weight" not in tensors
    codes = layer.weight_quant.encode(layer.weight).flatten().int() + 8
    assert stream.tolist() == (codes[::2] + 16 * codes[1::2]).tolist()  # the first of two in the lower half
    assert torch.equal(tensors["blocks.0.attn.qkv.weight_quant.step"], layer.weight_quant.step)
    with safe_open(packed, "pt") as file:
        header = json.loads(file.metadata()["qat"])
    assert header["packed"]["blocks.0.attn.qkv.weight"] == {"bits": 4, "qmin": -8, "shape": [72, 24]}
    assert header["arch"] == ARCH


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 10])
@pytest.mark.parametrize("kind", ["LSQ", "Uniform"])
def test_every_width_comes_back(tmp_path, bits, kind):
    spec = {"class_path": kind, "init_args": {"bits": bits, "granularity": "channel"}}
    torch.manual_seed(0)
    table = build_recipe("float", [{"match": "blocks.*.weight_quant", "spec": spec}])
    model = quantize(build_float(ARCH, None, 3, TINY).eval(), table)
    calibrate(model, [images()])
    card = Card(ARCH, dict(TINY), 3, [r.to_dict() for r in table], default_preprocessing(ARCH, TINY).to_dict(), [])
    content = {"pytorch-lightning_version": "2.6.0", "qat": card.to_dict()}
    write_packed(tmp_path / "a.safetensors", model, card, content)
    with torch.no_grad():
        assert torch.equal(qat.load(tmp_path / "a.safetensors")(images()), model(images()))
    stored = load_file(tmp_path / "a.safetensors")["blocks.0.mlp.fc1.weight_codes"]
    assert len(stored) == 24 * 96 * bits // 8


def test_float16_rounds_what_is_not_quantized(saved, tmp_path):
    model, content = saved
    path = tmp_path / "a.safetensors"
    write_packed(path, model, Card.from_dict(content["qat"], "a"), content, rest="float16")
    tensors, state = load_file(path), qat.load(path).state_dict()
    assert tensors["pos_embed"].dtype == torch.float16
    assert tensors["blocks.0.attn.qkv.weight_quant.step"].dtype == torch.float32
    for name, value in model.state_dict().items():
        if name.endswith("_quant.step") or name.endswith("_quant.offset"):
            assert torch.equal(state[name], value)
    assert torch.equal(state["pos_embed"], model.state_dict()["pos_embed"].half().float())
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.parametrize("size", [1e5, 1e-7])
def test_what_float16_cannot_hold_stays(saved, size):
    model, _ = saved
    model.norm.bias.data, before = torch.full_like(model.norm.bias, size), model.norm.bias.data
    tensors, _ = packed_state(model, "float16")
    model.norm.bias.data = before
    assert tensors["norm.bias"].dtype == torch.float32


def test_a_changed_byte_anywhere_is_noticed(packed):
    data = packed.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    places = [*range(9, 8 + size, 997), *range(8 + size, len(data), 1501), len(data) - 1]
    for place in places:
        packed.write_bytes(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])
        with pytest.raises(QatError, match=r"a\.safetensors") as error:
            checkpoint.read(packed)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 5, 8, 200, 0.5, 0.99])
def test_a_file_that_is_cut_off(packed, length):
    data = packed.read_bytes()
    packed.write_bytes(data[: length if isinstance(length, int) else int(length * len(data))])
    assert not is_packed(packed)
    with pytest.raises(QatError, match=r"cannot read .*a\.safetensors.*cut off"):
        checkpoint.read(packed)
    assert checkpoint.find_card(packed) is None


def rewritten(path: Path, change) -> None:
    """Change header and tensors and sign them again, as somebody would who wants to."""
    from qat.checkpoint.packed import as_json, digest

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["qat"])
    tensors = load_file(path)
    change(header, tensors)
    header["sha256"] = digest(header, tensors)
    save_file(tensors, path, {"format": "pt", "qat": as_json(header)})


@pytest.mark.parametrize("text", ["[" * 990 + "]" * 990, '{"sha256": ' + "9" * 5000 + "}", "[" + "[]," * 2**22 + "[]]"])
def test_a_card_that_is_a_bomb(tmp_path, text):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"format": "pt", "qat": text})
    for read in (checkpoint.read, checkpoint.find_card):
        with pytest.raises(QatError, match=r"a\.safetensors: its card cannot be read"):
            read(tmp_path / "a.safetensors")


WEIGHT = "blocks.0.attn.qkv.weight"
CHANGES = {
    "no map": (lambda h, t: h.pop("packed"), "the codes of .* are not .*damaged"),
    "another width": (lambda h, t: h["packed"][WEIGHT].update(bits=3), f"the codes of '{WEIGHT}' are not"),
    "another shape": (lambda h, t: h["packed"][WEIGHT].update(shape=[24, 72]), f"the codes of '{WEIGHT}' are not"),
    "no codes": (lambda h, t: t.pop(f"{WEIGHT}_codes"), f"the codes of '{WEIGHT}' are not"),
    "fewer codes": (lambda h, t: t.update({f"{WEIGHT}_codes": t[f"{WEIGHT}_codes"][:9]}), r"have the shape \(9,\)"),
    "no step": (lambda h, t: t.pop(f"{WEIGHT}_quant.step"), f"{WEIGHT}_quant.step is missing"),
    "a negative step": (lambda h, t: t[f"{WEIGHT}_quant.step"].neg_(), f"a step of '{WEIGHT}_quant' is -"),
    "a tensor more": (lambda h, t: t.update(x=torch.ones(1)), r"1 unexpected \(x\)"),
    "another depth": (lambda h, t: h["model_args"].update(depth=2), "the codes of 'blocks.1"),
    "no card": (lambda h, t: h.pop("arch"), "lacks 'arch'"),
    "another type": (lambda h, t: t.update({"norm.bias": t["norm.bias"].double()}), "'norm.bias' is of torch.float64"),
    "another format": (lambda h, t: h.update(format=9), "has format 9"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_do_not_fit_each_other(packed, name):
    change, message = CHANGES[name]
    rewritten(packed, change)
    with pytest.raises(QatError, match=message) as error:
        checkpoint.read(packed)
    assert "a.safetensors" in str(error.value)


def test_float_weights_are_no_packed_checkpoint(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert not is_packed(tmp_path / "a.safetensors")
    with pytest.raises(QatError, match=r"does not describe a quantized model.*--model.checkpoint"):
        read_packed(tmp_path / "a.safetensors")


@dataclass(frozen=True)
class Drifting(LSQ):
    """Values whose own codes are others."""

    def build(self, layout: Layout) -> LSQQuantizer:
        return DriftingQuantizer(self, layout)


class DriftingQuantizer(LSQQuantizer):
    def decode(self, codes):
        return super().decode(codes) + self.view(self.step, codes)


def test_a_weight_that_changes_when_it_is_read_is_refused_by_its_name(saved):
    model, _ = make()
    layer = model.blocks[0].mlp.fc1
    drifting = Drifting(bits=4).build(layer.weight_quant.layout)
    drifting.load_state_dict(layer.weight_quant.state_dict())
    layer.weight_quant = drifting
    with pytest.raises(QatError, match=r"'blocks.0.mlp.fc1.weight_quant' cannot be packed"):
        packed_state(model)
