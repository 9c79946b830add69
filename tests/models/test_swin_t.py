"""Swin-T as published: what is quantized, what it costs, and the logits of the official code of VVTQ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from qat.models import build_float
from qat.quantizers import Quantizer
from qat.recipe import Rule, build_recipe
from qat.sites.describe import cost, summary
from qat.sites.insert import quantize, quantizers
from tests import formula

SWIN_T = "swin_tiny_patch4_window7_224"
AS_VVTQ = [{"match": f"{place}.input_quant", "spec": None} for place in ("patch_embed.proj", "*.reduction")]
LOGITS = {  # 0 to 4 of the first of two images, from the official code in float64
    "float": (-0.02820995, -1.28602746, 2.07702200, 1.76495591, 0.07909801),
    "w4a4": (0.43234089, -0.82260781, 2.56426674, 1.83829616, 0.29346963),
    "w4a4, offset -0.17": (0.74332526, -0.40388685, 2.39158255, 1.81231712, 0.53797822),
}


def vvtq(rules: Sequence[dict[str, str | None]] = (), bits: int = 4) -> list[Rule]:
    return build_recipe("vvtq", rules, w_bits=bits, a_bits=bits)


def swin_t(bits: int = 4) -> nn.Module:
    with torch.device("meta"):  # shapes are all that counts
        return quantize(build_float(SWIN_T, None), vvtq(bits=bits))


def test_what_is_quantized_in_swin_tiny():
    model = swin_t()
    assert summary(model) == "weights 48 at 4 bit + 5 at 8 bit, activations 96 at 4 bit + 5 at 8 bit"
    steps, values = Counter(), Counter()
    for name, quantizer in quantizers(model):
        if not quantizer.layout.batched:
            steps[quantizer.spec.width] += quantizer.step.numel()
            values[quantizer.spec.width] += model.get_parameter(name.removesuffix("_quant")).numel()
    assert steps == {4: 72, 8: 5}  # q, k and v have one each
    assert values == {4: 25_878_528, 8: 2_320_896}
    wide = [name for name, quantizer in quantizers(model) if quantizer.spec.width == 8]
    layers = ["patch_embed.proj", *(f"layers.{i}.downsample.reduction" for i in (1, 2, 3)), "head.fc"]
    assert wide == [f"{layer}.{kind}_quant" for layer in layers for kind in ("input", "weight")]


def test_the_cost_of_swin_tiny_by_hand():
    C, T = (96, 192, 384, 768), (56 * 56, 28 * 28, 14 * 14, 7 * 7)
    linears = sum(depth * T[i] * 12 * C[i] ** 2 for i, depth in enumerate((2, 2, 6, 2)))
    attention = sum(depth * T[i] * 2 * 49 * C[i] for i, depth in enumerate((2, 2, 6, 2)))
    merging = sum(T[i] * 4 * C[i - 1] * C[i] for i in (1, 2, 3))
    ends = T[0] * 3 * 4 * 4 * C[0] + C[3] * 1000
    found = cost(swin_t(3), 224)
    assert found.float_bit_operations == (linears + attention + merging + ends) * 32 * 32
    assert linears + attention + merging + ends == 4_490_566_656
    assert found.bit_operations == (linears + attention) * 3 * 3 + (merging + ends) * 8 * 8
    assert found.float_size_mb == pytest.approx(28_288_354 * 4 / 1e6)
    packed = 25_878_528 * 3 / 8 + 2_320_896
    others = 28_288_354 - 25_878_528 - 2_320_896 + 72 + 5 + 101 + 12  # biases, norms; steps, offsets
    assert found.size_mb == pytest.approx((packed + others * 4) / 1e6)


def official_name(name: str) -> str:
    """VVTQ merges at the end of a stage, timm at the start of the next."""
    if ".downsample." in name:
        _, stage, rest = name.split(".", 2)
        return f"layers.{int(stage) - 1}.{rest}"
    return name.replace("head.fc.", "head.")


@cache
def filled() -> dict[str, Tensor]:
    """Weights by formula in timm's layout, numbered in the order of VVTQ's names; q, k and v are apart there."""
    with torch.device("meta"):
        ours = {name: value.shape for name, value in build_float(SWIN_T, None).state_dict().items()}
    shapes = {}
    for name, shape in ours.items():
        for part in "qkv" if ".qkv." in name else "-":
            split = official_name(name).replace(".qkv.", f".proj_{part}.")
            shapes[split] = shape if part == "-" else (shape[0] // 3, *shape[1:])
    assert len(shapes) == 221
    table = {name: formula.filled(name, shapes[name], t) for t, name in enumerate(sorted(shapes))}
    parts = {name: [official_name(name).replace(".qkv.", f".proj_{part}.") for part in "qkv"] for name in ours}
    return {
        name: torch.cat([table[part] for part in parts[name]]) if ".qkv." in name else table[official_name(name)]
        for name in ours
    }


def of_formula() -> nn.Module:
    model = build_float(SWIN_T, None).double().eval()
    model.load_state_dict(filled(), strict=True)
    return model


@torch.no_grad()
def test_the_float_model_gives_the_logits_of_the_official_code():
    model = quantize(of_formula(), [])
    assert model(formula.images()[:1])[0, :5].tolist() == pytest.approx(LOGITS["float"], abs=1e-7)


@torch.no_grad()
def test_the_quantized_model_gives_the_logits_of_the_official_code():
    model = quantize(of_formula(), vvtq(AS_VVTQ)).double()

    def first_step(quantizer: Quantizer, x: Tensor) -> None:
        """2 mean|x| / sqrt(qmax), the signed qmax whatever the sign."""
        rows = quantizer.grouped(x)
        quantizer.step.copy_(2 * rows.abs().mean(1) / sqrt(2 ** (quantizer.spec.width - 1) - 1))

    for name, quantizer in quantizers(model):
        if quantizer.offset is not None:
            quantizer.offset.zero_()
        if not quantizer.layout.batched:
            first_step(quantizer, model.get_parameter(name.removesuffix("_quant")))
    activations = [quantizer for _, quantizer in quantizers(model) if quantizer.layout.batched]
    assert len(activations) == 97
    hooks = [q.register_forward_pre_hook(lambda module, args: first_step(module, args[0])) for q in activations]
    assert model(formula.images())[0, :5].tolist() == pytest.approx(LOGITS["w4a4"], abs=1e-7)
    for hook in hooks:
        hook.remove()
    for quantizer in activations:
        if quantizer.offset is not None:
            quantizer.offset.fill_(-0.17)
    found = model(formula.images()[:1])
    assert found[0, :5].tolist() == pytest.approx(LOGITS["w4a4, offset -0.17"], abs=1e-7)
