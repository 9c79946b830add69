"""The program of docs/export.md reads what `qat export` writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qat
from qat.cli.main import main

TEXT = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")


PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_the_first_program_finds_the_weights(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--ckpt", str(ckpt), "--output", "deit_t_w4a4.safetensors"]) == 0
    scope: dict[str, object] = {}
    exec(PROGRAMS[0], scope)
    layer = qat.load(tmp_path / "deit_t_w4a4.safetensors").blocks[0].attn.qkv
    assert np.array_equal(scope["weight"], layer.weight_quant(layer.weight).detach().numpy())


def test_the_second_program_classifies_a_photo(ckpt, images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--ckpt", str(ckpt), "--output", "deit_t_w4a4.onnx", "--format", "onnx"]) == 0
    for name in ("ant", "bee", "cat"):
        Image.open(images / "val" / name / "0.png").save(tmp_path / "photo.jpg", quality=95)
        capsys.readouterr()
        exec(PROGRAMS[1], {})
        assert capsys.readouterr().out.strip() == name


def test_the_third_program_compares_codes(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--ckpt", str(ckpt), "--output", "deit_t_w4a4.safetensors"]) == 0
    scope: dict[str, object] = {"images": torch.randn(2, 3, 32, 32)}
    exec(PROGRAMS[2], scope)
    assert scope["found"]["float64"]["unequal"] == 0
