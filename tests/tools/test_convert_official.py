"""The converter as a command: official files in, files that qat reads out."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import qat
from qat.checkpoint import read
from qat.cli.main import main, run
from qat.data.folder import wnids
from qat.models import build_float
from qat.official import convert
from tests.conftest import CLASSES, write_images
from tests.formula import images as official_images
from tests.official.deit import TINY, fill, quantized
from tests.official.layouts import float32, fused
from tests.official.sret import SReT
from tests.official.sret import fill as sret_fill
from tests.official.sret import quantized as sret_quantized

spec = importlib.util.spec_from_file_location("tool", Path(__file__).parents[2] / "tools/convert_official.py")
assert spec is not None
assert spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

REST = {"epoch": 150, "arch": "resnet50", "best_acc1": torch.tensor(74.7), "optimizer": {"state": {}}}


@pytest.fixture(scope="module")
def quantized32() -> dict[str, Tensor]:
    """A complete W4A3 table."""
    table = float32(quantized(4, 3))
    for name in [name for name in table if name.endswith("init_state")]:
        table[name].fill_(1)
    return table


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float weights as VVTQ's training writes them."""
    path = tmp_path_factory.mktemp("float") / "deit_tiny.pth"
    torch.save({"model": float32(fill())}, path)
    return path


@pytest.fixture(scope="module")
def quantized_file(tmp_path_factory: pytest.TempPathFactory, quantized32: dict[str, Tensor]) -> Path:
    """A quantized checkpoint as VVTQ's training writes it."""
    path = tmp_path_factory.mktemp("quantized") / "model_best.pth.tar"
    torch.save({"state_dict": {f"module.{name}": value for name, value in quantized32.items()}, **REST}, path)
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the tool; what it printed, or the one line that it stopped with."""

    def call(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_official.py", *map(str, args)])
        capsys.readouterr()
        try:
            tool.main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return call


def test_a_quantized_checkpoint_is_loaded_and_evaluated(command, quantized_file, quantized32, tmp_path, caplog):
    output = tmp_path / "vvtq.ckpt"
    with caplog.at_level(logging.INFO):
        assert command(quantized_file, output) == f"{output}: {TINY}, W4A3 with 172 steps, 312 tensors\n"
    assert "left out: epoch, arch, best_acc1, optimizer" in caplog.messages
    assert list(tmp_path.iterdir()) == [output]
    state, expected = qat.load(output).state_dict(), convert(quantized32).state
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())

    write_images(tmp_path / "data/val", 1, seed=0)
    for name, wnid in zip(CLASSES, wnids(), strict=False):
        (tmp_path / "data/val" / name).rename(tmp_path / "data/val" / wnid)
    cli = run(["validate", "--ckpt", str(output), "--data.root", str(tmp_path / "data"), "--data.workers", "0"])
    assert cli.trainer.callback_metrics["val/images"] == 3
    assert (cli.model.preprocessing.resize, cli.model.preprocessing.size) == (256, 224)
    assert all(torch.equal(cli.model.model.state_dict()[name].cpu(), value) for name, value in expected.items())
    assert cli.model.card.classes == list(wnids())


def test_other_images_than_imagenets_are_refused(command, quantized_file, tmp_path, images, capsys):
    output = tmp_path / "vvtq.ckpt"
    command(quantized_file, output)
    assert main(["validate", "--ckpt", str(output), "--data.root", str(images)]) == 2
    assert "classes" in capsys.readouterr().err


def test_float_weights_are_loaded_strictly(command, float_file, tmp_path):
    output = tmp_path / "deit.safetensors"
    assert command(float_file, output) == f"{output}: {TINY}, float, 152 tensors\n"
    model = build_float(TINY, str(output))
    assert torch.equal(model.blocks[3].attn.qkv.weight[192:384], fill()["blocks.3.attn.proj_k.weight"].float())


@torch.no_grad()
def test_a_quantized_sret_computes_what_the_official_one_does(command, tmp_path):
    table = sret_quantized()
    SReT(table)(official_images())  # gives the activations their steps
    table, output = float32(table), tmp_path / "sret.ckpt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in table.items()}, **REST}, tmp_path / "a.tar")
    line = command(tmp_path / "a.tar", output, "--eval_permutation", "identity")
    assert line == f"{output}: sret_tiny, W4A4 with 232 steps, 592 tensors\n"
    assert read(output)[0].model_args == {"eval_permutation": "identity"}
    table = {name: value.double() if value.is_floating_point() else value for name, value in table.items()}
    theirs = SReT(table)(official_images()[:1])
    torch.testing.assert_close(qat.load(output).double()(official_images()[:1]), theirs, rtol=0, atol=1e-9)


def test_float_weights_of_sret_are_loaded_strictly(command, tmp_path):
    torch.save({"model": float32(fused(sret_fill()))}, tmp_path / "sret.pth")
    output = tmp_path / "sret.safetensors"
    assert command(tmp_path / "sret.pth", output) == f"{output}: sret_tiny, float, 350 tensors\n"
    model = build_float("sret_tiny", str(output))
    key = sret_fill()["transformers.2.blocks.8.attn.proj_k.weight"]
    assert torch.equal(model.stages[2].blocks[2].attn.qkv.weight[256:512], key.float())
    assert model.patch_embed.bn3.num_batches_tracked == 1003
    assert "leave it out" in command(tmp_path / "sret.pth", output, "--force", "--eval_permutation", "identity")


def test_options_reach_the_converter(command, quantized_file, tmp_path):
    assert "merges no patches" in command(quantized_file, tmp_path / "a.ckpt", "--reduction_bits", "trained")
    assert "'eval_permutation': 3" in command(quantized_file, tmp_path / "a.ckpt", "--eval_permutation", "3")
    assert "swin_tiny" in command(quantized_file, tmp_path / "a.ckpt", "--arch", "swin_large_patch4_window7_224")


def test_an_output_is_overwritten_only_when_asked(command, float_file, tmp_path):
    output = tmp_path / "deit.safetensors"
    output.write_text("precious")
    assert command(float_file, output).startswith(f"error: {output} exists")
    assert output.read_text() == "precious"
    assert "152 tensors" in command(float_file, output, "--force")
    assert "is the input" in command(output, output, "--force")
    assert "exists" in command(float_file, tmp_path, "--force")


def test_an_output_that_cannot_be_is_refused_before_work(command, float_file, quantized_file, tmp_path):
    assert "create it first" in command(float_file, tmp_path / "new/deit.safetensors")
    assert "ends in .safetensors" in command(float_file, tmp_path / "deit.ckpt")
    assert "ends in .ckpt" in command(quantized_file, tmp_path / "deit.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_file_that_could_not_be_written(command, float_file, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert command(float_file, tmp_path / "a.safetensors") == "error: no space left on device"
    assert list(tmp_path.iterdir()) == []


BIAS = {"blocks.0.norm1.bias": torch.zeros(192)}
FILES: dict[str, tuple[object, str]] = {
    "no container": (BIAS, "has .'blocks.0.norm1.bias'.: one table"),
    "two containers": ({"model": BIAS, "state_dict": BIAS}, "has .'model', 'state_dict'.: one table"),
    "no table": ([1, 2], "has ..: one table"),
    "no tensor": ({"model": {"lr": 0.1}}, "'lr' is a float, not a tensor"),
    "a number for a name": ({"model": {1: torch.ones(1)}}, "1 is a Tensor, not a tensor"),
    "half a prefix": (
        {"state_dict": {"module.cls_token": torch.ones(1), **BIAS}},
        "'blocks.0.norm1.bias' lacks the prefix 'module.'",
    ),
    "two prefixes": (
        {"state_dict": {f"module.module.blocks.0.attn.qkv.{name}": torch.ones(1) for name in ("weight", "bias")}},
        "width 0",
    ),
    "an empty table": ({"model": {}}, "no name has"),
    "a number of numpy": ({"best_acc1": np.float64(74.7), "state_dict": BIAS}, "numpy.*scalar.*weights_only=False"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_refused(name, command, tmp_path):
    content, message = FILES[name]
    torch.save(content, tmp_path / "file.pth")
    line = command(tmp_path / "file.pth", tmp_path / "out.ckpt")
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert "\n" not in line
    assert not (tmp_path / "out.ckpt").exists()


def test_a_missing_or_damaged_file_is_refused(command, tmp_path, quantized_file):
    assert "no file" in command(tmp_path / "none.pth", tmp_path / "out.ckpt")
    (tmp_path / "half.pth").write_bytes(quantized_file.read_bytes()[:100_000])
    assert "may be damaged" in command(tmp_path / "half.pth", tmp_path / "out.ckpt")
