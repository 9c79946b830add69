"""Official files in, files that qat reads out."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import qat
from qat.checkpoint import read
from qat.errors import QatError
from qat.models import build_float
from qat.official import convert
from qat.official.files import ConvertOptions, convert_file
from tests.formula import images
from tests.official.deit import TINY, OfficialFiles, fill, write_files
from tests.official.layouts import float32, fused
from tests.official.sret import SReT
from tests.official.sret import fill as sret_fill
from tests.official.sret import quantized as sret_quantized

Command = Callable[..., str]


@pytest.fixture(scope="module")
def official_files(tmp_path_factory: pytest.TempPathFactory) -> OfficialFiles:
    """A float and a quantized file of DeiT-T."""
    return write_files(tmp_path_factory.mktemp("official"))


@pytest.fixture
def converted(caplog: pytest.LogCaptureFixture) -> Command:
    """Convert a file; returns the last line of the log, or the message of the error."""

    def call(source: Path, output: Path, **options: object) -> str:
        with caplog.at_level(logging.INFO):
            try:
                convert_file(ConvertOptions(source, output, **options))
            except QatError as error:
                return str(error)
        return caplog.messages[-2]  # the last one is the next command

    return call


def test_a_quantized_checkpoint_becomes_one_that_describes_itself(converted, official_files, tmp_path, caplog):
    output = tmp_path / "vvtq.ckpt"
    line = converted(official_files.quantized, output)
    assert line == f"{output}: {TINY}, W4A3 with 172 steps, 312 tensors"
    assert "left out: epoch, arch, best_acc1, optimizer" in caplog.messages
    assert list(tmp_path.iterdir()) == [output]
    state, expected = qat.load(output).state_dict(), convert(official_files.table).state
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_float_weights_are_loaded_strictly(converted, official_files, tmp_path):
    output = tmp_path / "deit.safetensors"
    assert converted(official_files.float, output) == f"{output}: {TINY}, float, 152 tensors"
    model = build_float(TINY, str(output))
    assert torch.equal(model.blocks[3].attn.qkv.weight[192:384], fill()["blocks.3.attn.proj_k.weight"].float())


@torch.no_grad()
def test_a_quantized_sret_computes_what_the_official_one_does(converted, tmp_path):
    table = sret_quantized()
    SReT(table)(images())  # gives the activations their steps
    table, output = float32(table), tmp_path / "sret.ckpt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in table.items()}}, tmp_path / "a.tar")
    line = converted(tmp_path / "a.tar", output, eval_permutation="identity")
    assert line == f"{output}: sret_tiny, W4A4 with 232 steps, 592 tensors"
    assert read(output)[0].model_args == {"eval_permutation": "identity"}
    table = {name: value.double() if value.is_floating_point() else value for name, value in table.items()}
    theirs = SReT(table)(images()[:1])
    torch.testing.assert_close(qat.load(output).double()(images()[:1]), theirs, rtol=0, atol=1e-9)


def test_float_weights_of_sret_are_loaded_strictly(converted, tmp_path):
    torch.save({"model": float32(fused(sret_fill()))}, tmp_path / "sret.pth")
    output = tmp_path / "sret.safetensors"
    assert converted(tmp_path / "sret.pth", output) == f"{output}: sret_tiny, float, 350 tensors"
    model = build_float("sret_tiny", str(output))
    key = sret_fill()["transformers.2.blocks.8.attn.proj_k.weight"]
    assert torch.equal(model.stages[2].blocks[2].attn.qkv.weight[256:512], key.float())
    assert model.patch_embed.bn3.num_batches_tracked == 1003


def test_an_output_is_overwritten_only_when_asked(converted, official_files, tmp_path):
    output = tmp_path / "deit.safetensors"
    output.write_text("precious")
    assert converted(official_files.float, output).startswith(f"{output} exists")
    assert output.read_text() == "precious"
    assert "152 tensors" in converted(official_files.float, output, force=True)
    assert "is the input" in converted(output, output, force=True)
    assert "exists" in converted(official_files.float, tmp_path, force=True)


def test_an_output_that_cannot_be_written_is_refused_before_work(converted, official_files, tmp_path):
    assert "create it first" in converted(official_files.float, tmp_path / "new/deit.safetensors")
    assert "ends in .safetensors" in converted(official_files.float, tmp_path / "deit.ckpt")
    assert "ends in .ckpt" in converted(official_files.quantized, tmp_path / "deit.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_partial_file(official_files, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(QatError, match=r"cannot write .*a.safetensors: no space left"):
        convert_file(ConvertOptions(official_files.float, tmp_path / "a.safetensors"))
    assert list(tmp_path.iterdir()) == []


BIAS = {"blocks.0.norm1.bias": torch.zeros(192)}
FILES: dict[str, tuple[object, str]] = {
    "another model": (BIAS, "no name has 'attn.qkv' or 'attn.proj_q', the first is 'blocks.0.norm1.bias'"),
    "two tables of unknown names": ({"a": BIAS, "b": BIAS}, "several tables, a, b: choose one with checkpoint_key"),
    "no table": ([1, 2], "holds no table of weights"),
    "no tensor": ({"model": {"lr": 0.1}}, "holds no table of weights"),
    "a tensor and a number": ({"model": {**BIAS, "x": torch.ones(1), "lr": 0.1}}, "'lr' in 'model' is a float"),
    "a number for a name": ({"model": {1: torch.ones(1)}}, "holds no table of weights"),
    "half a prefix": (
        {"state_dict": {"module.cls_token": torch.ones(1), **BIAS}},
        "'blocks.0.norm1.bias' lacks the prefix 'module.'",
    ),
    "two prefixes": (
        {"state_dict": {f"module.module.blocks.0.attn.qkv.{name}": torch.ones(1) for name in ("weight", "bias")}},
        "0 channels",
    ),
    "an empty table": ({"model": {}}, "holds no table of weights"),
    "a number of numpy": ({"best_acc1": np.float64(74.7), "state_dict": BIAS}, "no name has 'attn.qkv'"),
}


def test_a_file_of_another_kind_is_refused_in_one_line(converted, tmp_path):
    for name, (content, message) in FILES.items():
        torch.save(content, tmp_path / "file.pth")
        line = converted(tmp_path / "file.pth", tmp_path / "out.ckpt")
        assert re.search(message, line), (name, line)
        assert "\n" not in line, name
        assert not (tmp_path / "out.ckpt").exists(), name


def test_a_missing_or_damaged_file_is_refused(converted, tmp_path, official_files):
    assert "no file" in converted(tmp_path / "none.pth", tmp_path / "out.ckpt")
    (tmp_path / "half.pth").write_bytes(official_files.quantized.read_bytes()[:100_000])
    assert "may be damaged" in converted(tmp_path / "half.pth", tmp_path / "out.ckpt")
