"""SReT-T in the official layout and in that of VVTQ: the converted model must compute the same."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.models import build_float
from qat.official import convert
from qat.recipe import build_recipe
from tests.formula import images
from tests.official.layouts import (
    CLASSES,
    Found,
    Table,
    count,
    float32,
    fused,
    model_of,
    numbered,
    owners,
    refusal,
    spoilt,
    with_offsets,
)
from tests.official.sret import LOGITS, OTHERS, SRET_T, STAGES, SReT, distinct, fill, quantized, shapes

IDENTITY = {"eval_permutation": "identity"}


@pytest.fixture(scope="module")
def calibrated() -> tuple[Table, Tensor]:
    """A W4A4 table whose activations took their steps from `images`, and the logits for these images, float64."""
    table = quantized()
    return table, SReT(table)(images())


@pytest.fixture(scope="module")
def table32(calibrated: tuple[Table, Tensor]) -> Table:
    """A complete table as a file holds it, with offsets."""
    return float32(with_offsets(calibrated[0], -0.17))


def test_the_forward_pass_of_these_tests_gives_the_logits_of_the_official_code(calibrated):
    table, logits = calibrated
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4"], abs=1e-7)
    logits = SReT(with_offsets(table, -0.17))(images()[:1])
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4, offset -0.17"], abs=1e-7)


@torch.no_grad()
def test_the_converted_model_computes_what_the_official_one_does(table32):
    ours = model_of(table32, model_args=IDENTITY).double()(images()[:1])  # float64, see the test of DeiT
    table = {name: value.double() if value.is_floating_point() else value for name, value in table32.items()}
    torch.testing.assert_close(ours, SReT(table)(images()[:1]), rtol=0, atol=1e-9)


def test_the_tables_of_these_tests_have_the_counts_of_official_files(table32):
    assert len(shapes()) == 387
    assert [len(table) for table in (fill(), fused(fill()), distinct(), fused(distinct()))] == [590, 510, 390, 350]
    assert len(table32) == 1746
    assert [count(table32, end) for end in ("nbits", "alpha", "init_state", "beta")] == [372, 372, 372, 40]
    bits = [int(value) for name, value in table32.items() if name.endswith("nbits")]
    assert (bits.count(4), bits.count(8)) == (360, 12)
    second = [name for name in table32 if re.match(r"transformers\.\d\.blocks\.(2|6|10|14|18)\.", name)]
    assert len(second) == 10 * 63
    buffers = ("init_state", "running_mean", "running_var", "num_batches_tracked")
    parameters = {n: v for n, v in table32.items() if n not in second and not n.endswith(buffers)}
    assert sum(value.numel() for value in parameters.values()) == 4_758_045
    switched = quantized(switch=True)
    assert (len(switched), count(switched, "beta")) == (1887, 181)
    assert [len(names) for names in owners(distinct(), OTHERS)] == [106, 126]


def test_every_quantizer_gives_its_step_to_one_site():
    table = numbered(quantized(2, 3, switch=True))
    for name in table:
        if second := re.match(r"(transformers\.\d\.blocks)\.(2|6|10|14|18)(\..*)", name):
            table[name] = table[f"{second[1]}.{int(second[2]) - 2}{second[3]}"].clone()
    found = Found(table, 2, 3, switch=True)
    assert len(found.left) == 232 - 2 * 10
    for s, (_, _, entries) in enumerate(STAGES):
        for j in range(entries // 4):
            found.attention(f"stages.{s}.blocks.{j}.attn", f"transformers.{s}.blocks.{4 * j}.attn")
            found.mlp(f"stages.{s}.blocks.{j}.mlp", f"transformers.{s}.blocks.{4 * j}.mlp")
        for i in range(entries // 2):
            found.mlp(f"stages.{s}.mlps.{i}.mlp", f"transformers.{s}.blocks.{2 * i + 1}.mlp")
    pairs = [(f"patch_embed.conv{i}", f"patch_embed.quant{i}") for i in (1, 2, 3)]
    for layer, q in [*pairs, *((f"pools.{i}.conv", f"pools.{i}.quant") for i in (0, 1))]:
        found.site(f"{layer}.input_quant", q, bits=8, offset=False)
        found.site(f"{layer}.weight_quant", layer, bits=8)
    found.site("head.input_quant", "quant", bits=8)
    found.site("head.weight_quant", "head", bits=8)
    assert not found.left


def test_the_card_has_the_widths_and_the_preprocessing_of_vvtq(table32):
    names = [f"class {i}" for i in range(CLASSES)]
    card = convert(table32, classes=names).card
    assert card is not None
    assert (card.arch, card.model_args, card.num_classes, card.classes) == (SRET_T, {}, CLASSES, names)
    assert card.rules == [rule.to_dict() for rule in build_recipe("vvtq", w_bits=4, a_bits=4)]
    assert (card.preprocessing["resize"], card.preprocessing["interpolation"]) == (256, "bilinear")


def test_the_order_of_tokens_is_portable_by_default(table32):
    model, identity = model_of(table32), model_of(table32, model_args=IDENTITY)
    assert model.stages[0].blocks[1].grouping.order[:8].tolist() == [226, 372, 713, 621, 630, 11, 239, 155]
    assert identity.stages[0].blocks[1].grouping.order is None
    assert "eval_permutation is 'sorted'" in refusal(table32, model_args={"eval_permutation": "sorted"})
    assert "are float: leave it out here" in refusal(float32(fill()), model_args=IDENTITY)


@torch.no_grad()
@pytest.mark.parametrize("layout", [dict, fused], ids=["split", "fused"])
def test_float_weights_of_either_layout_are_loaded(layout, caplog):
    with caplog.at_level(logging.WARNING):
        converted = convert(float32(layout(fill())))
    assert [message[:45] for message in caplog.messages] == ["the names do not show whether SReT was traine"] * (
        layout is fused  # published without slices too
    )
    assert converted.card is None
    assert len(converted.state) == 350
    assert converted.state["patch_embed.bn2.num_batches_tracked"] == 1002
    model = build_float(converted.arch, None)
    model.load_state_dict(converted.state, strict=True)
    model = model.eval().double()
    logits = model(images()[:1])
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["float, portable"], abs=1e-5)  # the weights are float32
    model.set_eval_permutation("identity")
    assert model(images()[:1])[0, :5].tolist() == pytest.approx(LOGITS["float"], abs=1e-5)


def test_no_memory_is_shared(table32):
    places = [{value.data_ptr() for value in table.values()} for table in (convert(table32).state, table32)]
    assert len(places[0]) == 350 + 212 + 30
    assert places[0].isdisjoint(places[1])


FIRST, SECOND = "transformers.1.blocks.4", "transformers.1.blocks.6"
OUTER = "patch_embed.bn1.num_batches_tracked"
DEFECTS: dict[str, tuple[Callable[[Table], object], str]] = {
    "another weight": (
        lambda t: t.update({f"{SECOND}.mlp.fc1.bias": t[f"{SECOND}.mlp.fc1.bias"].nextafter(torch.ones(()))}),
        f"'{SECOND}.mlp.fc1.bias' differs from '{FIRST}.mlp.fc1.bias', two names of one tensor",
    ),
    "another scalar": (lambda t: t[f"{FIRST}.coefficient3.bias"].add_(1), f"'{SECOND}.coefficient3.bias' differs from"),
    "another step": (lambda t: t[f"{SECOND}.attn.quant_k.alpha"].mul_(2), f"'{SECOND}.attn.quant_k.alpha' differs"),
    "another dead step": (lambda t: t[f"{SECOND}.attn.quant_k.alpha"][0:1].mul_(2), "attn.quant_k.alpha' differs"),
    "another state": (lambda t: t[f"{SECOND}.mlp.quant2.init_state"].zero_(), "mlp.quant2.init_state' differs"),
    "another width": (lambda t: t[f"{SECOND}.mlp.fc2.nbits"].fill_(3), f"'{SECOND}.mlp.fc2.nbits' differs from"),
    "another offset": (lambda t: t[f"{SECOND}.mlp.quant2.beta"].zero_(), f"'{SECOND}.mlp.quant2.beta' differs from"),
    "a zero of the other sign": (
        lambda t: [t[f"{at}.mlp.quant2.beta"].fill_(zero) for at, zero in ((FIRST, 0.0), (SECOND, -0.0))],
        f"'{SECOND}.mlp.quant2.beta' differs from",
    ),
    "one name of a weight": (lambda t: t.pop(f"{SECOND}.norm1.bias"), f"'{SECOND}.norm1.bias' is missing .1745 names"),
    "one name of a state": (lambda t: t.pop(f"{SECOND}.attn.proj.init_state"), "6.attn.proj.init_state' is missing"),
    "one name of an offset": (
        lambda t: t.pop(f"{SECOND}.mlp.quant2.beta"),
        rf"'{SECOND}.mlp.quant2.beta' is missing: 39 offsets, not one of \[40, 181\]",
    ),
    "no second names": (
        lambda t: [t.pop(n) for n in [*t] if n.startswith(SECOND)],
        f"'{SECOND}.mlp.quant2.beta' is missing",
    ),
    "an entry too many": (
        lambda t: t.update({"transformers.0.blocks.8.norm1.bias": torch.zeros(64)}),
        "'transformers.0.blocks.8.norm1.bias' is unexpected",
    ),
    "attention in an MLP": (
        lambda t: t.update({"transformers.0.blocks.1.attn.proj.bias": torch.zeros(64)}),
        "'transformers.0.blocks.1.attn.proj.bias' is unexpected",
    ),
    "no statistics": (lambda t: t.pop("patch_embed.bn1.running_var"), "'patch_embed.bn1.running_var' is missing"),
    "a count of floats": (lambda t: t.update({OUTER: t[OUTER].float()}), rf"'{OUTER}' is \(\) .*float32, not .*int64"),
    "SReT-LT": (
        lambda t: t.update({"transformers.0.blocks.0.mlp.fc1.bias": torch.zeros(256)}),
        r"64 channels .pos_embed. and 256 hidden ones .transformers.0.* are those of SReT-LT: only SReT-T",
    ),
    "SReT-S": (
        lambda t: t.update(
            {"pos_embed": torch.zeros(1, 126, 28, 28), "transformers.0.blocks.0.mlp.fc1.bias": torch.zeros(378)}
        ),
        "are those of SReT-S: only SReT-T .sret_tiny. is converted",
    ),
    "no embedding": (
        lambda t: t.pop("pos_embed"),
        r"0 channels .pos_embed. and 230 hidden ones .* are of no known SReT",
    ),
    "a larger grid": (
        lambda t: t.update({"pos_embed": torch.zeros(1, 64, 48, 48)}),
        r"'pos_embed' is \(1, 64, 48, 48\) .*not \(1, 64, 28, 28\)",
    ),
    "a stem of 4 bits": (
        lambda t: t.update({"patch_embed.conv2.nbits": torch.tensor([4.0])}),
        "'patch_embed.conv2.nbits' is 4, but the first and last layer has 8",
    ),
    "a pool of 4 bits": (lambda t: t["pools.1.quant.nbits"].fill_(4), "'pools.1.quant.nbits' is 4, but .* has 8"),
    "a step on the floor": (
        lambda t: [t[f"{at}.attn.proj_v.alpha"].fill_(1e-4) for at in (FIRST, SECOND)],
        rf"'{FIRST}.attn.proj_v.alpha\[2\]' is 0.0001",
    ),
    "an offset of the stem": (
        lambda t: t.update({"patch_embed.quant2.beta": torch.zeros(7)}),
        "'patch_embed.quant2.beta' is unexpected: 41 offsets",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_refused_by_name(name, table32):
    spoil, message = DEFECTS[name]
    assert re.search(message, refusal(spoilt(table32, spoil)))


@pytest.mark.parametrize("layout", [dict, fused], ids=["split", "fused"])
@pytest.mark.parametrize("name", ["another weight", "one name of a weight", "no statistics", "SReT-LT"])
def test_a_defect_of_float_weights_is_refused_too(name, layout):
    spoil, message = DEFECTS[name]
    assert re.search(message.split(" .1745")[0], refusal(spoilt(float32(layout(fill())), spoil)))
