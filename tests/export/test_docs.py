"""The program of docs/export.md reads what `qat export` writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import qat
from qat.cli.main import main

TEXT = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")


def test_the_program_finds_the_weights(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--ckpt", str(ckpt), "--output", "deit_t_w4a4.safetensors"]) == 0
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    scope: dict[str, object] = {}
    exec(program, scope)
    layer = qat.load(tmp_path / "deit_t_w4a4.safetensors").blocks[0].attn.qkv
    assert np.array_equal(scope["weight"], layer.weight_quant(layer.weight).detach().numpy())
