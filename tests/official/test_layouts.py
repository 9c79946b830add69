"""All layouts of official files convert, with a head of any size and whatever else a training file holds."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.checkpoint import read
from qat.errors import QatError
from qat.official.files import ConvertOptions, convert_file
from tests.official import deit, sret, swin
from tests.official.layouts import Table, float32, fused, numbered

LISTS = Path(__file__).parents[3] / "shared" / "data" / "official_keys"  # names, shapes and types in real files
FAMILIES = {"deit": deit, "swin": swin, "sret": sret}
LAYOUTS: dict[str, Callable[[], Table]] = {}
for _name, _family in FAMILIES.items():
    LAYOUTS |= {
        f"fp_{_name}": _family.fill,
        _name: lambda family=_family: fused(family.fill()),
        f"vvtq_{_name}": lambda family=_family: numbered(family.quantized()),
        f"vvtq_{_name}+off": lambda family=_family: numbered(family.quantized(switch=True)),
    }


class Config(dict):
    """Stands for the class of yacs whose object is in the files of Swin."""


def with_head(table: Table, classes: int) -> Table:
    """The table in float32, with so many outputs, and with one value for the two names of a tensor of SReT."""
    table = float32(table)
    for name in table:
        if second := re.match(r"(transformers\.\d\.blocks)\.(2|6|10|14|18)(\..*)", name):
            table[name] = table[f"{second[1]}.{int(second[2]) - 2}{second[3]}"].clone()
    if "patch_embed.quant.init_state" in table and "layers.0.downsample.norm.weight" in table:  # Swin never calls it
        table["patch_embed.quant.init_state"].zero_()
        table["patch_embed.quant.alpha"].zero_()
    return table | {name: table[name][:classes].clone() for name in ("head.weight", "head.bias")}


def saved(table: Table, path: Path) -> Path:
    parallel = {f"module.{name}": value for name, value in table.items()}
    rest = {"args": argparse.Namespace(lr=0.1), "config": Config(a=Config(b=1)), "epoch": 3}
    torch.save({"state_dict": parallel, **rest}, path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_converts_with_a_head_of_any_size(name, tmp_path, caplog):
    table = with_head(LAYOUTS[name](), 7)
    source, output = saved(table, tmp_path / "a.pth.tar"), tmp_path / ("a.ckpt" if "vvtq" in name else "a.safetensors")
    with caplog.at_level(logging.INFO):
        convert_file(ConvertOptions(source, output))
    assert "left out: args, config, epoch" in caplog.messages
    if "vvtq" in name:
        card, content = read(output)  # it compares the weights with the model of the card
        state = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
        assert (card.num_classes, card.classes) == (7, [])
        assert "the head has 7 outputs, whose names are not known: 1000 were given" in caplog.messages
    else:
        state = load_file(output)
    assert torch.equal(state["head.fc.weight" if "swin" in name else "head.weight"], table["head.weight"])


@pytest.mark.parametrize("name", [*sorted(LAYOUTS.keys() - {"deit"}), "vvtq_deit+mix"])
def test_these_are_the_layouts_of_real_files(name):
    path = LISTS / f"{name}.txt"
    if not path.exists():
        pytest.skip(f"{path} lists names, shapes and types of a real file, and is not here")
    table = float32(LAYOUTS[name.removesuffix("+mix")]())
    ours = {f"{key}\t{tuple(value.shape)}\t{str(value.dtype).removeprefix('torch.')}" for key, value in table.items()}
    assert ours == set(path.read_text().splitlines())


def test_a_file_with_raw_and_averaged_weights(tmp_path, caplog):
    table = with_head(deit.fill(), 7)
    averaged = {name: value + 1 for name, value in table.items()}
    torch.save({"model": table, "model_ema": averaged, "epoch": 3}, tmp_path / "a.pth")
    for key, wanted in ((None, averaged), ("model", table)):
        output = tmp_path / f"{key}.safetensors"
        with caplog.at_level(logging.INFO):
            convert_file(ConvertOptions(tmp_path / "a.pth", output, checkpoint_key=key))
        assert torch.equal(load_file(output)["head.weight"], wanted["head.weight"])
    assert any("took 'model_ema' (averaged weights); checkpoint_key chooses" in line for line in caplog.messages)


def test_what_needs_no_conversion_says_so(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"qat": {}, "state_dict": {}}, tmp_path / "a.ckpt")
    for name, message in (("a.safetensors", "as --model.checkpoint"), ("a.ckpt", "give it as --ckpt")):
        with pytest.raises(QatError, match=rf"{name} .*needs no conversion: give it {message}|needs no .*{message}"):
            convert_file(ConvertOptions(tmp_path / name, tmp_path / "out.safetensors"))
