"""`qat convert-official`: its options, its messages, and a converted checkpoint in the commands that come next."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest
import torch

from qat.cli.main import main, run
from qat.data.folder import wnids
from qat.official import convert
from tests.conftest import CLASSES, write_images
from tests.official.deit import TINY, OfficialFiles, write_files
from tools.convert_official import main as tool

Command = Callable[..., str]


@pytest.fixture(scope="module")
def official_files(tmp_path_factory: pytest.TempPathFactory) -> OfficialFiles:
    """A float and a quantized file of DeiT-T."""
    return write_files(tmp_path_factory.mktemp("official"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Command:
    """Run the verb; returns the last line of its log, or the line on stderr with which it stopped."""

    def call(*words: object) -> str:
        capsys.readouterr()
        with caplog.at_level(logging.INFO):
            code = main(["convert-official", *map(str, words)])
        printed = capsys.readouterr()
        assert printed.out == ""
        if not code:
            return caplog.messages[-2]
        assert code == 2
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("qat: error: ")
        return printed.err

    return call


def test_a_converted_checkpoint_is_evaluated_on_imagenet(command, official_files, images, tmp_path, capsys):
    output = tmp_path / "vvtq.ckpt"
    assert command(official_files.quantized, output) == f"{output}: {TINY}, W4A3 with 172 steps, 312 tensors"
    write_images(tmp_path / "data/val", 1, seed=0)
    for name, wnid in zip(CLASSES, wnids(), strict=False):
        (tmp_path / "data/val" / name).rename(tmp_path / "data/val" / wnid)
    cli = run(["validate", "--ckpt", str(output), "--data.root", str(tmp_path / "data"), "--data.workers", "0"])
    assert cli.trainer.callback_metrics["val/images"] == 3
    assert (cli.model.preprocessing.resize, cli.model.preprocessing.size) == (256, 224)
    expected = convert(official_files.table).state
    assert all(torch.equal(cli.model.model.state_dict()[name].cpu(), value) for name, value in expected.items())
    assert cli.model.card.classes == list(wnids())

    assert main(["validate", "--ckpt", str(output), "--data.root", str(images)]) == 2  # not classes of ImageNet
    assert "'ant' is none of the 1000" in capsys.readouterr().err


def test_options_reach_the_converter(command, official_files, tmp_path):
    quantized, out = official_files.quantized, tmp_path / "a.ckpt"
    assert "merges no patches" in command(quantized, out, "--reduction_bits", "trained")
    assert "'eval_permutation': 3" in command(quantized, out, "--eval_permutation", "3")
    assert "swin_tiny" in command(quantized, out, "--arch", "swin_large_patch4_window7_224")
    assert "leave it out" in command(official_files.float, tmp_path / "a.safetensors", "--eval_permutation", "identity")


def test_bad_input_ends_in_one_line_and_leaves_the_output_alone(command, official_files, tmp_path, monkeypatch):
    output = tmp_path / "deit.safetensors"
    output.write_text("precious")
    assert f"{output} exists" in command(official_files.float, output)
    assert "no file" in command(tmp_path / "none.pth", tmp_path / "out.ckpt")
    assert "--arhc" in command(official_files.float, output, "--arhc", TINY)

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "no space left on device" in command(official_files.float, output, "--force", "true")
    assert output.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [output]


def test_the_tool_is_the_verb(official_files, tmp_path, caplog):
    output = tmp_path / "deit.safetensors"
    with caplog.at_level(logging.INFO):
        assert tool([str(official_files.float), str(output)]) == 0
    assert caplog.messages[-2] == f"{output}: {TINY}, float, 152 tensors"
