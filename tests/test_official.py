"""Official layouts, written here by hand, against what the converter makes of them.

`fill` is a formula, and the logits in `LOGITS` were made by the official code of VVTQ from the same formula in float64;
they hold the forward pass written here, which then holds the converted model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat import official
from qat.errors import QatError
from qat.insert import quantizers, raise_for_uncalibrated
from qat.models import build_float
from qat.official import convert
from qat.recipe import build_recipe

Table = dict[str, Tensor]
TINY = "deit_tiny_patch16_224"
DEPTH, HEADS, CLASSES = 12, 3, 1000
UNSIGNED = ("quant_attn", "quant2")
LOGITS = {  # 0 to 4 of the first image
    "float": (-2.04080659, 1.16875444, -0.02748084, -0.03828243, -1.27750301),
    "w4a4": (-2.56814819, -0.21115564, -0.81082717, -1.18521714, -0.29885558),
    "w4a4, offset -0.17": (-1.44770046, -0.76193753, -0.71483376, -1.22141137, -0.80557491),
}


def split_shapes(C: int = 192) -> dict[str, tuple[int, ...]]:
    """Names and shapes of VVTQ's float DeiT."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, C), "pos_embed": (1, 197, C)}
    layers: dict[str, tuple[int, ...]] = {"patch_embed.proj": (C, 3, 16, 16), "norm": (C,), "head": (CLASSES, C)}
    for i in range(DEPTH):
        layers |= {f"blocks.{i}.{name}": (C,) for name in ("norm1", "norm2")}
        layers |= {f"blocks.{i}.attn.{name}": (C, C) for name in ("proj_q", "proj_k", "proj_v", "proj")}
        layers |= {f"blocks.{i}.mlp.fc1": (4 * C, C), f"blocks.{i}.mlp.fc2": (C, 4 * C)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def f(n: int, t: int) -> Tensor:
    """Numbers in -1..1 that every machine computes alike."""
    m = torch.arange(n)
    return 2 * ((31 * m * m + 7919 * m + 104729 * t) % 10007).double() / 10007 - 1


@cache
def fill() -> Table:
    """Float weights in the layout of VVTQ, float64."""
    table = {}
    for t, (name, shape) in enumerate(sorted(split_shapes().items())):
        values = f(torch.Size(shape).numel(), t).view(shape)
        if name in ("cls_token", "pos_embed") or name.endswith(".bias"):
            table[name] = 0.02 * values
        elif len(shape) == 1:
            table[name] = 1 + 0.1 * values
        else:
            table[name] = values * sqrt(3 / (values.numel() / shape[0]))
    return table


def fused(table: Table) -> Table:
    """The official layout of a float DeiT."""
    out = {name: value for name, value in table.items() if ".attn.proj_" not in name}
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = [table[f"blocks.{i}.attn.proj_{x}.{kind}"] for x in "qkv"]
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return out


def owners() -> tuple[list[str], list[str]]:
    """VVTQ's quantizers of weights and of activations."""
    weights, activations = ["patch_embed.proj", "head"], ["patch_embed.quant", "quant"]
    for i in range(DEPTH):
        weights += [f"blocks.{i}.attn.{x}" for x in ("proj_q", "proj_k", "proj_v", "proj")]
        weights += [f"blocks.{i}.mlp.{x}" for x in ("fc1", "fc2")]
        activations += [f"blocks.{i}.attn.quant_{x}" for x in ("input", "q", "k", "v", "attn", "output")]
        activations += [f"blocks.{i}.mlp.quant{x}" for x in (1, 2)]
    return weights, activations


def quantised(table: Table, w_bits: int = 4, a_bits: int = 4, switch: bool = False) -> Table:
    """The float weights and VVTQ's quantizers: weights with a step, activations not yet."""
    table = dict(table)
    weights, activations = owners()
    for q in weights + activations:
        inside = w_bits if q in weights else a_bits
        bits = inside if q.startswith("blocks.") else 8
        table[f"{q}.nbits"] = torch.tensor([float(bits)], dtype=torch.float64)
        table[f"{q}.alpha"] = torch.full((7,), 9.0, dtype=torch.float64)  # a wrong slot shows
        table[f"{q}.init_state"] = torch.ones(1, dtype=torch.float64)
        if q in weights:
            table[f"{q}.alpha"][bits - 2] = 2 * table[f"{q}.weight"].abs().mean() / sqrt(2 ** (bits - 1) - 1)
        elif q.endswith("quant2") or (switch and q != "patch_embed.quant" and not q.endswith("quant_attn")):
            table[f"{q}.beta"] = torch.zeros(7, dtype=torch.float64)
        if q in activations:
            table[f"{q}.init_state"].zero_()
    return table


class Official:
    """The forward pass of VVTQ's DeiT-T, as its formulas say: three projections, steps from slots; any float type."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def quant(self, q: str, x: Tensor) -> Tensor:
        """step * round(clip((x - beta) / step)) + beta; an activation that has no step yet takes it from ``x``."""
        table = self.table
        bits = int(table[f"{q}.nbits"])
        if not table[f"{q}.init_state"]:
            table[f"{q}.alpha"].fill_(2 * x.abs().mean() / sqrt(2 ** (bits - 1) - 1))  # all slots, as in VVTQ
            table[f"{q}.init_state"].fill_(1)
        low, high = (0, 2**bits - 1) if q.endswith(UNSIGNED) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        step, beta = table[f"{q}.alpha"][bits - 2], table[f"{q}.beta"][bits - 2] if f"{q}.beta" in table else 0.0
        return step * ((x - beta) / step).clamp(low, high).round() + beta

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.quant(name, self.table[f"{name}.weight"]), self.table[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.table[f"{name}.weight"], self.table[f"{name}.bias"], 1e-6)

    def attention(self, at: str, x: Tensor) -> Tensor:
        x = self.quant(f"{at}.quant_input", x)
        parts = [self.linear(f"{at}.proj_{p}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in "qkv"]
        q, k, v = (self.quant(f"{at}.quant_{p}", part) for p, part in zip("qkv", parts, strict=True))  # (B, H, N, D)
        probs = self.quant(f"{at}.quant_attn", (q @ k.mT / sqrt(q.shape[-1])).softmax(-1))
        return self.linear(f"{at}.proj", self.quant(f"{at}.quant_output", probs @ v).transpose(1, 2).flatten(2))

    def mlp(self, at: str, x: Tensor) -> Tensor:
        hidden = F.gelu(self.linear(f"{at}.fc1", self.quant(f"{at}.quant1", x)))
        return self.linear(f"{at}.fc2", self.quant(f"{at}.quant2", hidden))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        patch = "patch_embed.proj"
        weight = self.quant(patch, self.table[f"{patch}.weight"])
        x = F.conv2d(self.quant("patch_embed.quant", images), weight, self.table[f"{patch}.bias"], stride=16)
        token = self.table["cls_token"].expand(len(x), -1, -1)
        x = torch.cat([token, x.flatten(2).mT], 1) + self.table["pos_embed"]
        for i in range(DEPTH):
            x = x + self.attention(f"blocks.{i}.attn", self.norm(f"blocks.{i}.norm1", x))
            x = x + self.mlp(f"blocks.{i}.mlp", self.norm(f"blocks.{i}.norm2", x))
        return self.linear("head", self.quant("quant", self.norm("norm", x)[:, 0]))


def images() -> Tensor:
    """Two images, float64."""
    return 2 * f(2 * 3 * 224 * 224, 999).view(2, 3, 224, 224)


@pytest.fixture(scope="module")
def calibrated() -> tuple[Table, Tensor]:
    """A W4A4 table whose activations took their steps from `images`, and the logits of that pass, float64."""
    table = quantised(fill())
    return table, Official(table)(images())


@pytest.fixture(scope="module")
def table32(calibrated: tuple[Table, Tensor]) -> Table:
    """A complete table of float32 tensors, as a file holds it."""
    return {name: value.float() for name, value in calibrated[0].items()}


def with_offsets(table: Table, offset: float) -> Table:
    """All live offsets set, the dead ones far away."""
    out = dict(table)
    for name in table:
        if name.endswith(".beta"):
            out[name] = torch.full_like(table[name], 5.0)
            out[name][int(table[name.replace("beta", "nbits")]) - 2] = offset
    return out


def model_of(table: Table) -> nn.Module:
    converted = convert(table)
    assert converted.card is not None
    model = converted.card.build()
    model.load_state_dict(converted.state, strict=True)
    return model.eval()


@torch.no_grad()
def test_the_forward_pass_written_here_is_that_of_the_official_code(calibrated):
    table, logits = calibrated
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4"], abs=1e-7)
    logits = Official(with_offsets(table, -0.17))(images())
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["w4a4, offset -0.17"], abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("switch", [False, True], ids=["offset after GELU", "offsets everywhere"])
def test_the_converted_model_computes_what_the_official_one_does(table32, switch):
    if switch:
        steps = {name: value for name, value in table32.items() if not name.endswith(".beta")}
        table32 = {name: value.float() for name, value in quantised(fill(), switch=True).items()} | steps
    table = with_offsets(table32, -0.17)
    image = images()[:1]
    # in float64: the fused projection adds in another order, which moves sums by 1e-16, and in float32 by 1e-7, where
    # it can push one of millions of values over a rounding boundary and so move a logit by as much as 1
    ours = model_of(table).double()(image)
    theirs = Official({name: value.double() for name, value in table.items()})(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_the_table_written_here_has_the_counts_of_an_official_file(table32):
    def count(end: str, tables: Table = table32) -> int:
        return sum(name.endswith(f".{end}") for name in tables)

    assert len(table32) == 728
    assert [count(end) for end in ("nbits", "alpha", "init_state", "beta")] == [172, 172, 172, 12]
    bits = [int(value) for name, value in table32.items() if name.endswith("nbits")]
    assert (bits.count(4), bits.count(8)) == (168, 4)
    assert sum(value.numel() for name, value in table32.items() if not name.endswith("init_state")) == 5_718_876
    assert sum(value.numel() for value in fill().values()) == 5_717_416
    switched = quantised(fill(), switch=True)
    assert (len(switched), count("beta", switched)) == (801, 85)


@pytest.mark.parametrize(("w_bits", "a_bits", "switch"), [(2, 3, False), (4, 2, True), (8, 4, False)])
def test_every_quantizer_finds_its_site(w_bits, a_bits, switch):
    table = {name: value.float() for name, value in quantised(fill(), w_bits, a_bits, switch).items()}
    for n, q in enumerate([*owners()[0], *owners()[1]]):  # every quantizer has numbers of its own
        slot = int(table[f"{q}.nbits"]) - 2
        table[f"{q}.alpha"][slot] = 0.01 + n
        table[f"{q}.init_state"].fill_(1)
        if f"{q}.beta" in table:
            table[f"{q}.beta"][slot] = -n
    model = model_of(table)
    raise_for_uncalibrated(model)
    named = dict(quantizers(model))
    assert len(named) == 172 - 2 * DEPTH

    def check(site: str, *qs: str, bits: int = a_bits, signed: bool = True, offset: bool = switch) -> None:
        quantizer = named.pop(site)
        steps = [table[f"{q}.alpha"][bits - 2].item() for q in qs]
        assert quantizer.step.tolist() == steps
        assert (quantizer.spec.bits, quantizer.spec.signed, quantizer.spec.offset) == (bits, signed, offset)
        assert not offset or quantizer.offset.tolist() == [table[f"{qs[0]}.beta"][bits - 2].item()]

    for i in range(DEPTH):
        a, m = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        check(f"{a}.qkv.input_quant", f"{a}.quant_input")
        check(f"{a}.qkv.weight_quant", *(f"{a}.proj_{x}" for x in "qkv"), bits=w_bits, offset=False)
        for x in "qkv":
            check(f"{a}.{x}_quant", f"{a}.quant_{x}")
        check(f"{a}.probs_quant", f"{a}.quant_attn", signed=False, offset=False)
        check(f"{a}.proj.input_quant", f"{a}.quant_output")
        check(f"{a}.proj.weight_quant", f"{a}.proj", bits=w_bits, offset=False)
        check(f"{m}.fc1.input_quant", f"{m}.quant1")
        check(f"{m}.fc1.weight_quant", f"{m}.fc1", bits=w_bits, offset=False)
        check(f"{m}.fc2.input_quant", f"{m}.quant2", signed=False, offset=True)
        check(f"{m}.fc2.weight_quant", f"{m}.fc2", bits=w_bits, offset=False)
    check("patch_embed.proj.input_quant", "patch_embed.quant", bits=8, offset=False)
    check("patch_embed.proj.weight_quant", "patch_embed.proj", bits=8, offset=False)
    check("head.input_quant", "quant", bits=8)
    check("head.weight_quant", "head", bits=8, offset=False)
    assert not named


def test_the_card_says_what_vvtq_evaluates_with(table32):
    card = convert(table32, classes=("a", "b")).card
    assert card is not None
    assert (card.arch, card.model_args, card.num_classes, card.classes) == (TINY, {}, CLASSES, ["a", "b"])
    assert card.rules == [rule.to_dict() for rule in build_recipe("vvtq", w_bits=4, a_bits=4)]
    assert (card.preprocessing["resize"], card.preprocessing["size"]) == (256, 224)
    assert card.preprocessing["interpolation"] == "bilinear"


@torch.no_grad()
@pytest.mark.parametrize("layout", [dict, fused], ids=["split", "fused"])
def test_float_weights_of_either_layout_fit_timm(layout, caplog):
    table = {name: value.float() for name, value in layout(fill()).items()}
    with caplog.at_level(logging.WARNING):
        converted = convert(table)
    assert len(caplog.messages) == (layout is dict)  # VVTQ's own float training clamps GELU, which no name tells
    assert all("clamps GELU" in message for message in caplog.messages)
    assert converted.card is None
    assert len(converted.state) == 152
    model = build_float(TINY, None)
    model.load_state_dict(converted.state, strict=True)
    logits = model.eval().double()(images()[:1])
    assert logits[0, :5].tolist() == pytest.approx(LOGITS["float"], abs=1e-5)  # the weights are float32


def test_the_architecture_is_told_by_the_width():
    table = fused({name: torch.zeros(shape) for name, shape in split_shapes(384).items()})
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


def test_a_changed_recipe_is_noticed(table32, monkeypatch):
    monkeypatch.setattr(official, "build_recipe", lambda name, rules, w, a: build_recipe("vvtq", rules, w, 5))
    with pytest.raises(QatError, match=r"blocks.0.attn.k_quant' is LSQ\(bits=5.*restore the recipe"):
        convert(table32)


Q = "blocks.3.attn.quant_q"
DEFECTS: dict[str, tuple[Callable[[Table], object], str]] = {
    "a weight is missing": (lambda t: t.pop("norm.bias"), "'norm.bias' is missing .727 names, 1 missing"),
    "a state is missing": (lambda t: t.pop(f"{Q}.init_state"), f"'{Q}.init_state' is missing"),
    "a width is missing": (lambda t: t.pop(f"{Q}.nbits"), f"'{Q}.nbits' is missing"),
    "all widths are missing": (lambda t: [t.pop(n) for n in [*t] if n.endswith(".nbits")], "nbits' is missing.*172"),
    "a name is left over": (lambda t: t.update({"dist_token": torch.zeros(1)}), "'dist_token' is unexpected"),
    "a head of others": (lambda t: t.update({"head.bias": torch.zeros(10)}), r"'head.bias' is \(10,\).*\(1000,\)"),
    "six slots": (lambda t: t.update({f"{Q}.alpha": torch.ones(6)}), rf"'{Q}.alpha' is \(6,\).*not \(7,\)"),
    "half precision": (lambda t: t.update({"norm.bias": t["norm.bias"].half()}), r"'norm.bias' is .*float16.*float32"),
    "not a number": (lambda t: t.update({"norm.bias": t["norm.bias"] / 0}), "'norm.bias' is not finite"),
    "head-wise": (lambda t: t.update({f"{Q}.nbits": torch.full((3,), 4.0)}), rf"'{Q}.nbits' is \[4.0.*head-wise"),
    "a float build": (lambda t: t.update({f"{Q}.nbits": torch.tensor([-1.0])}), rf"'{Q}.nbits' is \[-1.0\].*float"),
    "width between": (lambda t: t.update({f"{Q}.nbits": torch.tensor([3.6])}), f"'{Q}.nbits' is 3.6: only integers"),
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
    "an endless step": (lambda t: t.update({f"{Q}.alpha": torch.full((7,), torch.inf)}), r"alpha\[2\]' is inf"),
    "no offset": (lambda t: t.pop("blocks.3.mlp.quant2.beta"), "'blocks.3.mlp.quant2.beta' is missing: 11 offsets"),
    "a lonely offset": (lambda t: t.update({f"{Q}.beta": torch.zeros(7)}), f"'{Q}.beta' is unexpected: 13 offsets"),
    "an offset of NaN": (lambda t: t["blocks.3.mlp.quant2.beta"].fill_(torch.nan), "quant2.beta' is not finite"),
    "both layouts": (
        lambda t: t.update({"blocks.0.attn.qkv.bias": torch.zeros(576)}),
        "'blocks.0.attn.qkv.bias' is a f",
    ),
    "neither layout": (
        lambda t: [t.pop(n) for n in [*t] if ".proj_q." in n],
        "no name has 'attn.qkv' or 'attn.proj_q'",
    ),
    "a fused block": (lambda t: [t.pop(n) for n in [*t] if "blocks.7.attn.proj_q." in n], "proj_q.weight' is missing"),
    "a Swin": (lambda t: [t.update({f"layers.0.{n}": t.pop(n)}) for n in [*t]], "width 0 and depth 0 .*--arch"),
    "eleven blocks": (lambda t: [t.pop(n) for n in [*t] if n.startswith("blocks.11.")], "width 192 and depth 11"),
    "no token": (lambda t: t.pop("cls_token"), "width 0 and depth 12"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_refused_by_name(name, table32):
    spoil, message = DEFECTS[name]
    table = {key: value.clone() if value.numel() < 8 else value for key, value in table32.items()}
    spoil(table)
    with pytest.raises(QatError, match=message) as raised:
        convert(table)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a weight is missing", "a name is left over", "half precision", "not a number"])
@pytest.mark.parametrize("layout", [dict, fused], ids=["split", "fused"])
def test_a_defect_of_float_weights_is_refused_too(name, layout):
    spoil, message = DEFECTS[name]
    table = {key: value.float() for key, value in layout(fill()).items()}
    spoil(table)
    with pytest.raises(QatError, match=message.split(" .7")[0]):
        convert(table)
