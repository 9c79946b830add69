"""Swin-T in the official layout and in that of VVTQ: the converted model must compute the same."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.models import build_float
from qat.official import convert
from qat.official.swin import SwinLayout
from qat.recipe import build_recipe
from qat.sites.insert import FloatSite, sites
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
from tests.official.swin import DEPTHS, LOGITS, OTHERS, SWIN_T, Swin, fill, quantized, shapes


@pytest.fixture(scope="module")
def calibrated() -> tuple[Table, Tensor]:
    """A W4A4 table whose activations took their steps from `images`, and the logits for these images, float64."""
    table = quantized()
    return table, Swin(table)(images())


@pytest.fixture(scope="module")
def table32(calibrated: tuple[Table, Tensor]) -> Table:
    """A complete table as a file holds it, with offsets."""
    return float32(with_offsets(calibrated[0], -0.17))


def double(table: Table) -> Table:
    return {name: value.double() if value.is_floating_point() else value for name, value in table.items()}


def test_the_forward_pass_of_these_tests_gives_the_logits_of_the_official_code(calibrated):
    table, logits = calibrated
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4"], abs=1e-7)
    logits = Swin(with_offsets(table, -0.17))(images()[:1])
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4, offset -0.17"], abs=1e-7)


@torch.no_grad()
def test_the_converted_model_computes_what_the_official_one_does(table32):
    ours = model_of(table32).double()(images()[:1])  # float64, see the test of DeiT
    torch.testing.assert_close(ours, Swin(double(table32))(images()[:1]), rtol=0, atol=1e-9)


def test_the_table_of_these_tests_has_the_counts_of_an_official_file(table32):
    assert len(shapes()) == 221
    assert len(table32) == 775
    assert [count(table32, end) for end in ("nbits", "alpha", "init_state", "beta")] == [175, 175, 175, 12]
    bits = [int(value) for name, value in table32.items() if name.endswith("nbits")]
    assert (bits.count(4), bits.count(8)) == (168, 7)
    assert {end: count(table32, end) for end in ("relative_position_index", "attn_mask")} == {
        "relative_position_index": 12,
        "attn_mask": 5,
    }
    left_out = ("init_state", "relative_position_index", "attn_mask")
    assert sum(value.numel() for name, value in table32.items() if not name.endswith(left_out)) == 28_289_838
    switched = quantized(switch=True)
    assert (len(switched), count(switched, "beta")) == (848, 85)
    assert [len(names) for names in owners(fill(), OTHERS)] == [77, 98]


def test_every_quantizer_gives_its_step_to_one_site():
    table = numbered(quantized(3, 2, switch=True)) | dict.fromkeys(["patch_embed.quant.init_state"], torch.zeros(1))
    table["patch_embed.quant.alpha"] = torch.zeros(7)
    found = Found(table, 3, 2, switch=True)
    assert len(found.left) == 174 - 2 * sum(DEPTHS)
    for at in [f"layers.{s}.blocks.{i}" for s, depth in enumerate(DEPTHS) for i in range(depth)]:
        found.attention(f"{at}.attn", f"{at}.attn")
        found.mlp(f"{at}.mlp", f"{at}.mlp")
    for s in range(3):
        layer = f"layers.{s + 1}.downsample.reduction"
        found.site(f"{layer}.weight_quant", f"layers.{s}.downsample.reduction", bits=8)
    found.site("patch_embed.proj.weight_quant", "patch_embed.proj", bits=8)
    found.site("head.fc.input_quant", "quant", bits=8)
    found.site("head.fc.weight_quant", "head", bits=8)
    assert not found.left


def test_the_image_and_the_inputs_of_merging_stay_float(table32):
    names = [f"class {i}" for i in range(CLASSES)]
    card = convert(table32, classes=names).card
    assert card is not None
    assert (card.arch, card.model_args, card.num_classes, card.classes) == (SWIN_T, {}, CLASSES, names)
    vvtq = [rule.to_dict() for rule in build_recipe("vvtq", w_bits=4, a_bits=4)]
    inputs = [{"match": f"{place}.input_quant", "spec": None} for place in ("patch_embed.proj", "*.reduction")]
    assert card.rules == vvtq + inputs
    with torch.device("meta"):
        kinds = dict(sites(card.build()))
    layers = ["patch_embed.proj", *(f"layers.{s}.downsample.reduction" for s in (1, 2, 3))]
    assert all(isinstance(kinds[f"{layer}.input_quant"], FloatSite) for layer in layers)
    assert (card.preprocessing["resize"], card.preprocessing["interpolation"]) == (256, "bilinear")


@torch.no_grad()
def test_float_weights_of_either_layout_fit_timm(caplog):
    with caplog.at_level(logging.WARNING):
        split, whole = convert(float32(fill())), convert(float32(fused(fill())))
    assert not caplog.messages
    assert split.card is None
    assert split.state.keys() == whole.state.keys()
    assert all(torch.equal(value, whole.state[name]) for name, value in split.state.items())
    model = build_float(split.arch, None)
    model.load_state_dict(split.state, strict=True)
    logits = model.eval().double()(images()[:1])
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["float"], abs=1e-5)  # the weights are float32


WIDTHS = {0: (7.62, 8), 1: (4.5, 4), 2: (9.3, 8)}  # in the file, and clipped to 2..8 and rounded half to even


@torch.no_grad()
def test_trained_widths_are_converted_on_request(table32, caplog):
    layers = {f"layers.{s}.downsample.reduction": width for s, width in WIDTHS.items()}
    table = table32 | {f"{name}.nbits": torch.tensor([bits]) for name, (bits, _) in layers.items()}
    table |= {f"{name}.alpha": 0.01 * torch.arange(1.0, 8.0) for name in layers}
    with caplog.at_level(logging.WARNING):
        model = model_of(table, reduction_bits="trained")
    for (name, (bits, width)), message in zip(layers.items(), caplog.messages, strict=True):
        assert message == f"{name}.nbits is {bits:g}, trained from 8: converted with {width} bits"
    for s, (name, (_, width)) in enumerate(layers.items()):
        layer = model.get_submodule(f"layers.{s + 1}.downsample.reduction")
        assert layer.weight_quant.spec.bits == width
        x = torch.randn(2, layer.weight.shape[1], generator=torch.Generator().manual_seed(s))
        torch.testing.assert_close(layer(x), Swin(table).linear(name, x))


def test_the_architecture_is_inferred_from_channels_and_blocks():
    for width, depth, arch in ((96, 12, "tiny"), (96, 24, "small"), (128, 24, "base")):
        depths = (2, 2, depth - 6, 2)
        table = {f"layers.{s}.blocks.{i}.norm1.bias": torch.zeros(1) for s in range(4) for i in range(depths[s])}
        table["patch_embed.norm.weight"] = torch.zeros(width)
        assert SwinLayout().find_arch(table) == f"swin_{arch}_patch4_window7_224"


R = "layers.0.downsample.reduction"
BIAS_INDEX, MASK = "layers.1.blocks.0.attn.relative_position_index", "layers.2.blocks.5.attn_mask"
DEFECTS: dict[str, tuple[Callable[[Table], object], str]] = {
    "a weight is missing": (lambda t: t.pop("head.bias"), "'head.bias' is missing .774 names, 1 missing"),
    "timm's place of merging": (
        lambda t: t.update({"layers.3.downsample.norm.bias": t.pop("layers.2.downsample.norm.bias")}),
        "'layers.2.downsample.norm.bias' is missing",
    ),
    "no index": (lambda t: t.pop(BIAS_INDEX), f"'{BIAS_INDEX}' is missing"),
    "no mask": (lambda t: t.pop(MASK), f"'{MASK}' is missing"),
    "a mask too many": (lambda t: t.update({"layers.3.blocks.1.attn_mask": t[MASK]}), "3.blocks.1.attn_mask' is unexp"),
    "another index": (
        lambda t: t.update({BIAS_INDEX: t[BIAS_INDEX].T.clone()}),
        f"'{BIAS_INDEX}' differs from what swin_tiny",
    ),
    "another mask": (lambda t: t.update({MASK: t[MASK] / 2}), f"'{MASK}' differs from what swin_tiny.* computes"),
    "an index of floats": (lambda t: t.update({BIAS_INDEX: t[BIAS_INDEX].float()}), r"float32, not \(49, 49\) .*int64"),
    "a bias of merging": (lambda t: t.update({f"{R}.bias": torch.zeros(192)}), f"'{R}.bias' is unexpected"),
    "a quantized input of merging": (
        lambda t: t.update({"layers.0.downsample.quant.nbits": torch.tensor([8.0])}),
        "'layers.0.downsample.quant.nbits' is unexpected",
    ),
    "no quantizer of the image": (
        lambda t: [t.pop(n) for n in [*t] if n.startswith("patch_embed.quant.")],
        "'patch_embed.quant.nbits' is missing",
    ),
    "a quantized image": (
        lambda t: t.update({"patch_embed.quant.init_state": torch.ones(1)}),
        r"'patch_embed.quant.init_state' is \[1.0\], not 0: VVTQ never calls",
    ),
    "a step for the image": (
        lambda t: t.update({"patch_embed.quant.alpha": torch.ones(7)}),
        r"'patch_embed.quant.alpha' is \[1.0, .*, not 0",
    ),
    "an image of 4 bits": (
        lambda t: t.update({"patch_embed.quant.nbits": torch.tensor([4.0])}),
        r"'patch_embed.quant.nbits' is \[4.0\], not 8",
    ),
    "a trained width": (
        lambda t: t.update({f"{R}.nbits": torch.tensor([7.62])}),
        f"'{R}.nbits' is 7.62, .* computes with 8 bits there: give --reduction_bits trained",
    ),
    "an integer width": (lambda t: t.update({f"{R}.nbits": torch.tensor([5.0])}), f"'{R}.nbits' is 5, .* with 5 bits"),
    "a width of NaN": (
        lambda t: t.update({f"{R}.nbits": torch.tensor([torch.nan])}),
        f"'{R}.nbits' is nan: .*div",
    ),
    "a step on the floor": (lambda t: t.update({f"{R}.alpha": torch.full((7,), 1e-4)}), r"alpha\[6\]' is 0.0001"),
    "an offset of the image": (
        lambda t: t.update({"patch_embed.quant.beta": torch.zeros(7)}),
        r"'patch_embed.quant.beta' is unexpected: 13 offsets, not one of \[12, 85\]",
    ),
    "a block less": (
        lambda t: [t.pop(n) for n in [*t] if n.startswith("layers.2.blocks.5.")],
        "no Swin-T, S or B has 96 channels .* and 11 blocks: give its timm name .--arch",
    ),
    "no norm": (lambda t: t.pop("patch_embed.norm.weight"), "no Swin-T, S or B has 0 channels .* and 12 blocks"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_refused_by_name(name, table32):
    spoil, message = DEFECTS[name]
    assert re.search(message, refusal(spoilt(table32, spoil)))


@pytest.mark.parametrize("name", ["timm's place of merging", "no mask", "another index", "a bias of merging"])
def test_a_defect_of_float_weights_is_refused_too(name):
    spoil, message = DEFECTS[name]
    assert re.search(message, refusal(spoilt(float32(fused(fill())), spoil)))


def test_a_quantized_model_of_another_size_is_refused(table32):
    found = refusal(table32, arch="swin_large_patch4_window7_224")
    assert found.startswith("arch is 'swin_large_patch4_window7_224': quantized files are converted for swin_tiny")
