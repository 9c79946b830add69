"""DeiT in the official layout and in that of VVTQ: the converted model must compute the same."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.models import build_float
from qat.official import conversion, convert
from qat.recipe import build_recipe
from tests.formula import images
from tests.official.deit import DEPTH, LOGITS, OTHERS, TINY, DeiT, fill, quantized, shapes
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


@pytest.fixture(scope="module")
def calibrated() -> tuple[Table, Tensor]:
    """A W4A4 table whose activations took their steps from `images`, and the logits for these images, float64."""
    table = quantized()
    return table, DeiT(table)(images())


@pytest.fixture(scope="module")
def table32(calibrated: tuple[Table, Tensor]) -> Table:
    """A complete table of float32 tensors, as a file holds it."""
    return float32(calibrated[0])


def test_the_forward_pass_of_these_tests_gives_the_logits_of_the_official_code(calibrated):
    table, logits = calibrated
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4"], abs=1e-7)
    logits = DeiT(with_offsets(table, -0.17))(images()[:1])
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4, offset -0.17"], abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("switch", [False, True], ids=["offset after GELU", "offsets everywhere"])
def test_the_converted_model_computes_what_the_official_one_does(table32, switch):
    if switch:
        steps = {name: value for name, value in table32.items() if not name.endswith(".beta")}
        table32 = float32(quantized(switch=True)) | steps
    table = with_offsets(table32, -0.17)
    image = images()[:1]
    # The fused projection adds in another order. In float32 that moves sums by 1e-7, which can push one of millions of
    # values over a rounding boundary and so move a logit by as much as 1; in float64 it moves them by 1e-16.
    ours = model_of(table).double()(image)
    theirs = DeiT({name: value.double() for name, value in table.items()})(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_the_table_of_these_tests_has_the_counts_of_an_official_file(table32):
    assert len(table32) == 728
    assert [count(table32, end) for end in ("nbits", "alpha", "init_state", "beta")] == [172, 172, 172, 12]
    bits = [int(value) for name, value in table32.items() if name.endswith("nbits")]
    assert (bits.count(4), bits.count(8)) == (168, 4)
    assert sum(value.numel() for name, value in table32.items() if not name.endswith("init_state")) == 5_718_876
    assert sum(value.numel() for value in fill().values()) == 5_717_416
    switched = quantized(switch=True)
    assert (len(switched), count(switched, "beta")) == (801, 85)
    assert [len(names) for names in owners(fill(), OTHERS)] == [74, 98]


@pytest.mark.parametrize(("w_bits", "a_bits", "switch"), [(2, 3, False), (4, 2, True), (8, 4, False)])
def test_every_quantizer_gives_its_step_to_one_site(w_bits, a_bits, switch):
    found = Found(numbered(quantized(w_bits, a_bits, switch)), w_bits, a_bits, switch)
    assert len(found.left) == 172 - 2 * DEPTH
    for i in range(DEPTH):
        found.attention(f"blocks.{i}.attn", f"blocks.{i}.attn")
        found.mlp(f"blocks.{i}.mlp", f"blocks.{i}.mlp")
    found.site("patch_embed.proj.input_quant", "patch_embed.quant", bits=8, offset=False)
    found.site("patch_embed.proj.weight_quant", "patch_embed.proj", bits=8)
    found.site("head.input_quant", "quant", bits=8)
    found.site("head.weight_quant", "head", bits=8)
    assert not found.left


def test_the_card_has_the_widths_and_the_preprocessing_of_vvtq(table32):
    names = [f"class {i}" for i in range(CLASSES)]
    card = convert(table32, classes=names).card
    assert card is not None
    assert (card.arch, card.model_args, card.num_classes, card.classes) == (TINY, {}, CLASSES, names)
    assert card.rules == [rule.to_dict() for rule in build_recipe("vvtq", w_bits=4, a_bits=4)]
    assert (card.preprocessing["resize"], card.preprocessing["size"]) == (256, 224)
    assert card.preprocessing["interpolation"] == "bilinear"


@torch.no_grad()
@pytest.mark.parametrize("layout", [dict, fused], ids=["split", "fused"])
def test_float_weights_of_either_layout_fit_timm(layout, caplog):
    with caplog.at_level(logging.WARNING):
        converted = convert(float32(layout(fill())))
    assert len(caplog.messages) == (layout is dict)  # VVTQ's own float training clamps GELU, which no name shows
    assert all("clamps GELU" in message for message in caplog.messages)
    assert converted.card is None
    assert len(converted.state) == 152
    model = build_float(TINY, None)
    model.load_state_dict(converted.state, strict=True)
    logits = model.eval().double()(images()[:1])
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["float"], abs=1e-5)  # the weights are float32


def test_the_architecture_is_inferred_from_the_channels():
    table = fused({name: torch.zeros(shape) for name, shape in shapes(384).items()})
    assert convert(table).arch == "deit_small_patch16_224"


def test_another_architecture_can_be_named_for_float_weights(table32):
    arch = "deit_tiny_distilled_patch16_224"
    state = build_float(arch, None).state_dict()
    assert convert(state, arch).state.keys() == state.keys()
    with pytest.raises(QatError, match=r"'dist_token' is unexpected \(155 names"):
        convert(state)
    with pytest.raises(QatError, match=r"arch is 'vit_tiny_patch16_224'.*deit_tiny_patch16_224"):
        convert(table32, "vit_tiny_patch16_224")
    with pytest.raises(QatError, match="no model 'deit_tin'"):
        convert(state, "deit_tin")
    with pytest.raises(QatError, match=r"'patch_embed.norm.weight' is missing"):
        convert(float32(fill()), "swin_tiny_patch4_window7_224")


def test_options_of_other_families_are_refused(table32):
    with pytest.raises(QatError, match="reduction_bits is 'trained', but deit_tiny_patch16_224 merges no patches"):
        convert(table32, reduction_bits="trained")
    with pytest.raises(QatError, match=r"deit_tiny_patch16_224 does not take .'eval_permutation'"):
        convert(table32, model_args={"eval_permutation": "identity"})
    with pytest.raises(QatError, match=r"reduction_bits 'trained' is for a quantized model.*float"):
        convert(float32(fill()), reduction_bits="trained")


def test_a_changed_recipe_is_noticed(table32, monkeypatch):
    monkeypatch.setattr(conversion, "build_recipe", lambda name, rules, w, a: build_recipe("vvtq", rules, w, 5))
    with pytest.raises(QatError, match=r"blocks.0.attn.k_quant' is LSQ\(bits=5.*restore the recipe"):
        convert(table32)


Q = "blocks.3.attn.quant_q"
DEFECTS: dict[str, tuple[Callable[[Table], object], str]] = {
    "a weight is missing": (lambda t: t.pop("norm.bias"), "'norm.bias' is missing .727 names, 1 missing"),
    "a state is missing": (lambda t: t.pop(f"{Q}.init_state"), f"'{Q}.init_state' is missing"),
    "a width is missing": (lambda t: t.pop(f"{Q}.nbits"), f"'{Q}.nbits' is missing"),
    "all widths are missing": (lambda t: [t.pop(n) for n in [*t] if n.endswith(".nbits")], "nbits' is missing.*172"),
    "a name is left over": (lambda t: t.update({"dist_token": torch.zeros(1)}), "'dist_token' is unexpected"),
    "a head of another size": (
        lambda t: t.update({"head.bias": torch.zeros(10)}),
        r"'head.bias' is \(10,\).*\(1000,\)",
    ),
    "six slots": (lambda t: t.update({f"{Q}.alpha": torch.ones(6)}), rf"'{Q}.alpha' is \(6,\).*not \(7,\)"),
    "half precision": (lambda t: t.update({"norm.bias": t["norm.bias"].half()}), r"'norm.bias' is .*float16.*float32"),
    "an infinite weight": (lambda t: t.update({"norm.bias": t["norm.bias"] / 0}), "'norm.bias' is not finite"),
    "head-wise": (lambda t: t.update({f"{Q}.nbits": torch.full((3,), 4.0)}), rf"'{Q}.nbits' is \[4.0.*head-wise"),
    "a float build": (lambda t: t.update({f"{Q}.nbits": torch.tensor([-1.0])}), rf"'{Q}.nbits' is \[-1.0\].*float"),
    "a fractional width": (
        lambda t: t.update({f"{Q}.nbits": torch.tensor([3.6])}),
        f"'{Q}.nbits' is 3.6: only integers",
    ),
    "width 9": (lambda t: t.update({f"{Q}.nbits": torch.tensor([9.0])}), f"'{Q}.nbits' is 9: only integers 2 to 8"),
    "mixed activations": (lambda t: t.update({f"{Q}.nbits": torch.tensor([3.0])}), f"'{Q}.nbits' is 3, but .* has 4"),
    "mixed weights": (
        lambda t: t.update({"blocks.0.attn.proj_k.nbits": torch.tensor([3.0])}),
        "'blocks.0.attn.proj_k.nbits' is 3, but blocks.0.attn.proj_q has 4",
    ),
    "a head of 4 bits": (lambda t: t.update({"head.nbits": torch.tensor([4.0])}), "'head.nbits' is 4, but .* has 8"),
    "never used": (lambda t: t.update({f"{Q}.init_state": torch.zeros(1)}), f"'{Q}.init_state' is 0, not 1"),
    "a step on the floor": (lambda t: t.update({f"{Q}.alpha": torch.full((7,), 1e-4)}), r"alpha\[2\]' is 0.0001"),
    "a step that is NaN": (lambda t: t.update({f"{Q}.alpha": torch.full((7,), torch.nan)}), r"alpha\[2\]' is nan"),
    "an infinite step": (lambda t: t.update({f"{Q}.alpha": torch.full((7,), torch.inf)}), r"alpha\[2\]' is inf"),
    "no offset": (lambda t: t.pop("blocks.3.mlp.quant2.beta"), "'blocks.3.mlp.quant2.beta' is missing: 11 offsets"),
    "a single offset": (lambda t: t.update({f"{Q}.beta": torch.zeros(7)}), f"'{Q}.beta' is unexpected: 13 offsets"),
    "an offset of NaN": (lambda t: t["blocks.3.mlp.quant2.beta"].fill_(torch.nan), "quant2.beta' is not finite"),
    "both layouts": (
        lambda t: t.update({"blocks.0.attn.qkv.bias": torch.zeros(576)}),
        "'blocks.0.attn.qkv.bias' is a f",
    ),
    "no attention": (
        lambda t: [t.pop(n) for n in [*t] if ".proj_q." in n],
        "no name has 'attn.qkv' or 'attn.proj_q'",
    ),
    "a fused block": (lambda t: [t.pop(n) for n in [*t] if "blocks.7.attn.proj_q." in n], "proj_q.weight' is missing"),
    "a Swin": (
        lambda t: [t.update({f"layers.0.{n}": t.pop(n)}) for n in [*t]],
        "no Swin-T.* has 0 channels .*and 12 blocks",
    ),
    "eleven blocks": (
        lambda t: [t.pop(n) for n in [*t] if n.startswith("blocks.11.")],
        "no DeiT has 192 channels .* and 11 blocks",
    ),
    "no token": (lambda t: t.pop("cls_token"), "no DeiT has 0 channels .* and 12 blocks"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_refused_by_name(name, table32):
    spoil, message = DEFECTS[name]
    assert re.search(message, refusal(spoilt(table32, spoil)))


@pytest.mark.parametrize("name", ["a weight is missing", "a name is left over", "half precision", "an infinite weight"])
@pytest.mark.parametrize("layout", [dict, fused], ids=["split", "fused"])
def test_a_defect_of_float_weights_is_refused_too(name, layout):
    spoil, message = DEFECTS[name]
    assert re.search(message.split(" .7")[0], refusal(spoilt(float32(layout(fill())), spoil)))
