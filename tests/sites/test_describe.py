"""The table of sites and the cost of a model."""

import csv
from dataclasses import fields
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

from qat.models import build_float
from qat.quantizers import LSQ
from qat.recipe import Rule, build_recipe
from qat.sites.describe import FLOAT_BITS, SiteRow, as_table, cost, describe, summary, write_csv
from qat.sites.insert import quantize, quantizers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny(*rules: dict, w_bits: int = 4, a_bits: int = 4, arch: str = "deit_tiny_patch16_224") -> nn.Module:
    return quantize(build_float(arch, None, 10, TINY), build_recipe("vvtq", rules, w_bits=w_bits, a_bits=a_bits))


def printed(rows: list[SiteRow], full: bool = False) -> list[str]:
    out = StringIO()
    Console(file=out, width=80, color_system=None).print(as_table(rows, full))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("bits", "size_mb"), [(4, 3.28), (3, 2.61), (2, 1.95)])
def test_the_size_of_deit_tiny(bits, size_mb):
    with torch.device("meta"):  # shapes are all that counts here
        model = quantize(build_float("deit_tiny_patch16_224", None), build_recipe("vvtq", w_bits=bits, a_bits=bits))
    found = cost(model, 224)
    assert found.size_mb == pytest.approx(size_mb, abs=0.01)
    assert found.float_size_mb == pytest.approx(5_717_416 * 4 / 1e6)


def test_the_cost_of_a_tiny_model_by_hand():
    N, C, classes = 17, 24, 10
    embedding = 16 * C * 3 * 8 * 8
    linears = 2 * N * C * (3 * C + C + 4 * C + 4 * C)
    attention = 2 * 2 * N * N * C
    head = C * classes
    found = cost(tiny(w_bits=3, a_bits=5), 32)
    assert found.bit_operations == embedding * 64 + linears * 3 * 5 + attention * 5 * 5 + head * 64
    assert found.float_bit_operations == (embedding + linears + attention + head) * 32 * 32

    packed = 2 * (3 * C * C + C * C + 8 * C * C)
    eight = C * 3 * 8 * 8 + C * classes
    biases = C + 2 * (3 * C + C + 4 * C + C) + classes
    norms, embeddings, steps = 2 * C * 5, C + N * C, 2 + 3 * 2 + 3 * 2 + 2 * 9 + 2
    assert found.size_mb * 8e6 == pytest.approx(packed * 3 + eight * 8 + (biases + norms + embeddings + steps) * 32)
    assert found.float_size_mb * 1e6 == pytest.approx((packed + eight + biases + norms + embeddings) * 4)


def test_a_float_model_costs_what_float_costs():
    found = cost(quantize(build_float("deit_tiny_patch16_224", None, 10, TINY), []), 32)
    assert found.size_mb == found.float_size_mb
    assert found.bit_operations == found.float_bit_operations


def test_both_heads_of_a_distilled_model_are_counted():
    plain, distilled = (cost(tiny(arch=f"deit_tiny{kind}_patch16_224"), 32) for kind in ("", "_distilled"))
    N, C = 17, 24
    tokens = 2 * C * 12 * C * 16 + 2 * 2 * ((N + 1) ** 2 - N**2) * C * 16  # one token more
    assert distilled.bit_operations - plain.bit_operations == tokens + C * 10 * 64


def test_measuring_leaves_the_model_as_it_was():
    model = tiny().train()
    model_flags = [quantizer.enabled for _, quantizer in quantizers(model)]
    cost(model, 32)
    assert model.training
    assert [quantizer.enabled for _, quantizer in quantizers(model)] == model_flags
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_row_has_spec_layout_and_state_of_its_site():
    rows = {row.site: row for row in describe(tiny())}
    weight = rows["blocks.1.attn.qkv.weight_quant"]
    assert (weight.quantizer, weight.bits, weight.levels) == ("LSQ", 4, 16)
    assert (weight.granularity, weight.groups, weight.calibrated) == ("qkv", 3, False)
    assert weight.range == "-8..7"
    assert "offset" in rows["blocks.0.mlp.fc2.input_quant"].range
    assert rows["blocks.0.attn.probs_quant"].range == "0..15"
    assert rows["head.output_quant"].quantizer == "float"
    assert rows["head.output_quant"].bits == FLOAT_BITS


def test_a_row_says_whether_its_site_is_calibrated():
    model = tiny()
    with torch.no_grad():
        model.head.weight_quant.step.fill_(0.1)
    assert [row.site for row in describe(model) if row.calibrated] == ["head.weight_quant"]


def test_the_summary_counts_widths():
    assert summary(tiny(w_bits=2, a_bits=3)) == "weights 8 at 2 bit + 2 at 8 bit, activations 16 at 3 bit + 2 at 8 bit"
    assert summary(quantize(build_float("deit_tiny_patch16_224", None, 10, TINY), [])) == "float"


def test_the_csv_has_every_site(tmp_path):
    rows = describe(tiny())
    write_csv(rows, tmp_path / "sites.csv")
    with (tmp_path / "sites.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [line["site"] for line in read] == [row.site for row in rows]
    assert list(read[0]) == [field.name for field in fields(SiteRow)]
    assert read[0]["bits"] == "8"


def test_blocks_that_are_alike_share_a_line_of_80_columns():
    lines = printed(describe(tiny()))
    shared = [line.split()[:4] for line in lines if "qkv.weight_quant" in line]
    assert shared == [["blocks.*.attn.qkv.weight_quant", "2", "LSQ", "4"]]
    assert sum("head.weight_quant" in line for line in lines) == 1
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)


def test_a_block_that_differs_has_its_own_line():
    lines = printed(describe(tiny(Rule("blocks.1.attn.proj.weight_quant", LSQ(2)).to_dict())))
    shown = [line.split()[:4] for line in lines if "attn.proj.weight_quant" in line]
    assert shown == [
        ["blocks.0.attn.proj.weight_quant", "1", "LSQ", "4"],
        ["blocks.1.attn.proj.weight_quant", "1", "LSQ", "2"],
    ]


def test_the_full_table_has_a_line_per_site():
    rows = describe(tiny())
    lines = printed(rows, full=True)
    assert sum("_quant" in line for line in lines) == len(rows)
