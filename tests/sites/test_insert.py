"""Insertion: which sites a model has, which rule fills them, and what is refused."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from timm.layers import Attention, DiffAttention, GatedMlp
from timm.models.vision_transformer import DiffParallelScalingBlock
from torch import nn

from qat.errors import QatError
from qat.models import build_float
from qat.quantizers import LSQ, BitLog2, LogIntSoftmax, LogSqrt2
from qat.recipe import Rule, build_recipe
from qat.sites.insert import FloatSite, quantize, quantizers, raise_for_uncalibrated, sites, switched_off

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny(arch: str = "deit_tiny_patch16_224", **arguments: object) -> nn.Module:
    return build_float(arch, None, 10, {**TINY, **arguments})


def vvtq(*rules: dict) -> list[Rule]:
    return build_recipe("vvtq", rules, w_bits=4, a_bits=4)


def test_deit_has_these_sites_in_this_order():
    block = ["norm1.output", "attn.qkv.input", "attn.qkv.weight", "attn.qkv.output", "attn.q", "attn.k", "attn.v"]
    block += ["attn.scores"]
    block += ["attn.probs", "attn.proj.input", "attn.proj.weight", "attn.proj.output"]
    block += ["norm2.output"]
    block += [f"mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("input", "weight", "output")]
    block += ["attn_residual", "mlp_residual"]
    expected = [f"patch_embed.proj.{part}" for part in ("input", "weight", "output")]
    expected += ["tokens", "pos_embed", "embed"]
    expected += [f"blocks.{i}.{site}" for i in range(2) for site in block]
    expected += ["norm.output"]
    expected += [f"head.{part}" for part in ("input", "weight", "output")]
    assert [name for name, _ in sites(quantize(tiny(), []))] == [f"{name}_quant" for name in expected]


def test_without_rules_every_site_stays_in_floating_point():
    model = quantize(tiny(), [])
    assert all(type(site) is FloatSite for _, site in sites(model))
    assert not list(quantizers(model))


def test_the_last_rule_fills_a_site_and_null_empties_it():
    rules = vvtq({"match": "head*", "spec": None}, Rule("blocks.1.*.weight_quant", LSQ(2)).to_dict())
    found = {name: quantizer.spec for name, quantizer in quantizers(quantize(tiny(), rules))}
    assert "head.weight_quant" not in found
    assert found["blocks.0.mlp.fc1.weight_quant"] == LSQ(4, grad_scale="l1")
    assert found["blocks.1.mlp.fc1.weight_quant"] == LSQ(2)


@pytest.mark.parametrize(
    ("site", "granularity", "layout"),
    [
        ("patch_embed.proj.weight_quant", "channel", (0, 24)),
        ("patch_embed.proj.input_quant", "channel", (1, 3)),
        ("blocks.0.attn.qkv.weight_quant", "qkv", (0, 3)),
        ("blocks.0.attn.qkv.weight_quant", "head", (0, 9)),
        ("blocks.0.attn.qkv.weight_quant", "channel", (0, 72)),
        ("blocks.0.attn.qkv.input_quant", "channel", (-1, 24)),
        ("blocks.0.attn.q_quant", "head", (1, 3)),
        ("blocks.0.attn.v_quant", "channel", (-1, 8)),
        ("blocks.0.attn.probs_quant", "head", (1, 3)),
        ("blocks.0.attn.proj.weight_quant", "head", (1, 3)),
        ("blocks.0.attn.proj.input_quant", "head", (-1, 3)),
        ("blocks.0.mlp.fc2.input_quant", "channel", (-1, 96)),
        ("blocks.0.attn_residual_quant", "channel", (-1, 24)),
        ("head.weight_quant", "channel", (0, 10)),
    ],
)
def test_a_site_offers_its_granularities(site, granularity, layout):
    model = quantize(tiny(), [Rule(site, LSQ(4, granularity=granularity))])
    ((name, quantizer),) = quantizers(model)
    assert name == site
    assert (quantizer.layout.axis, quantizer.layout.groups) == layout
    assert quantizer.step.shape == (layout[1],)


def test_the_rows_of_q_k_and_v_have_steps_of_their_own():
    model = quantize(tiny(), [Rule("*.qkv.weight_quant", LSQ(4, granularity="qkv"))])
    qkv = model.blocks[0].attn.qkv
    rows = qkv.weight_quant.grouped(qkv.weight)
    for row, part in zip(rows, qkv.weight.chunk(3), strict=True):  # timm fuses them in this order
        assert torch.equal(row, part.flatten())


def test_a_site_without_the_granularity_says_which_it_has():
    rule = Rule("*.attn.probs_quant", LSQ(4, granularity="channel"))
    message = r"rule '\*.attn.probs_quant': site 'blocks.0.attn.probs_quant' has no granularity 'channel'.*tensor, head"
    with pytest.raises(QatError, match=message):
        quantize(tiny(), [rule])


def test_an_option_that_a_site_cannot_have_names_rule_and_site():
    with pytest.raises(QatError, match=r"rule '\*.attn.q_quant' at site 'blocks.0.attn.q_quant': grad_scale l1"):
        quantize(tiny(), [Rule("*.attn.q_quant", LSQ(4, grad_scale="l1"))])


@pytest.mark.parametrize(
    ("match", "nearest"),
    [
        ("blocks.0.attn.prob_quant", "blocks.0.attn.probs_quant"),
        ("blocks.1.mlp.fc1.weigth_quant", "blocks.1.mlp.fc1.weight_quant"),
        ("haed.weight_quant", "head.weight_quant"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest_site(match, nearest):
    with pytest.raises(QatError, match=f"matches no site; the nearest is '{nearest}'; `qat describe` lists them all"):
        quantize(tiny(), [Rule(match, LSQ(4))])


def test_a_model_without_a_head_says_how_to_get_one():
    model = build_float("vit_small_patch14_dinov2", None, None, {**TINY, "num_heads": 2})
    with pytest.raises(QatError, match=r"rule 'head\*.weight_quant' matches no site, because .*--model.num_classes N"):
        quantize(model, vvtq())


def test_a_rule_that_is_overruled_everywhere_is_still_used():
    model = quantize(tiny(), [Rule("head.weight_quant", LSQ(8)), Rule("*", LSQ(4))])
    assert {quantizer.spec.width for _, quantizer in quantizers(model)} == {4}


class OtherAttention(Attention):
    """What a user may pass as ``attn_layer``."""


def gated() -> nn.Module:
    model = tiny()
    model.blocks[1].attn = Attention(24, 3, qkv_bias=True, gated=True)
    return model


def swin_v2() -> nn.Module:
    small = {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    return build_float("swinv2_tiny_window8_256", None, 10, small)


def convnext() -> nn.Module:
    return build_float("convnext_atto", None, 10, {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)})


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (gated, r"blocks\.1\.attn\.gate: gated attention"),
        (lambda: tiny("vit_tiny_patch16_224", attn_layer=DiffAttention), r"blocks\.0\.attn is a DiffAttention"),
        (lambda: tiny("vit_tiny_patch16_224", attn_layer=OtherAttention), r"blocks\.0\.attn is a OtherAttention"),
        (lambda: tiny("vit_tiny_patch16_224", global_pool="prr"), "attn_pool is a AttentionPoolPrr: only timm's"),
        (
            lambda: tiny("vit_tiny_patch16_224", block_fn=DiffParallelScalingBlock),
            r"blocks\.0 is a DiffParallelScaling",
        ),
        (lambda: tiny("vit_tiny_patch16_224", mlp_layer=GatedMlp), r"blocks\.0\.mlp is a GatedMlp: .* SwiGLU are"),
        (swin_v2, "SwinTransformerV2 is not a model family.*it knows .*VisionTransformer"),
        (convnext, "ConvNeXt is not a model family"),
        (lambda: build_float("vit_tiny_r_s16_p8_224", None, 10, {"img_size": 32, "depth": 1}), "patch_embed.*Hybrid"),
    ],
    ids=["gated", "differential", "other", "pooling", "parallel", "mlp", "swin_v2", "convnext", "hybrid"],
)
def test_what_is_not_reproduced_is_refused_by_name(build, named):
    with pytest.raises(QatError, match=named):
        quantize(build(), vvtq())


def test_every_quantizer_starts_uncalibrated_and_says_so():
    model = quantize(tiny(), vvtq())
    with pytest.raises(QatError, match=r"28 of 28 quantizers .*'patch_embed.proj.input_quant': calibrate first"):
        raise_for_uncalibrated(model)


def test_switched_off_restores_each_flag_even_after_an_error():
    model = quantize(tiny(), vvtq())
    found = [quantizer for _, quantizer in quantizers(model)]
    found[0].enabled = False
    with switched_off(found):
        assert not any(quantizer.enabled for quantizer in found)
    assert [quantizer.enabled for quantizer in found] == [False] + [True] * (len(found) - 1)
    with pytest.raises(ZeroDivisionError), switched_off(found):
        1 / 0  # noqa: B018
    assert [quantizer.enabled for quantizer in found] == [False] + [True] * (len(found) - 1)


def test_the_inventory_of_deit_tiny():
    with torch.device("meta"):  # names and shapes are all that counts here
        model = quantize(build_float("deit_tiny_patch16_224", None), vvtq())
    found = [quantizer for _, quantizer in quantizers(model)]
    weights = {name: q for name, q in quantizers(model) if not q.layout.batched}
    assert len(weights) == 50
    assert sum(q.step.numel() for q in weights.values()) == 74  # q, k and v have one each in twelve fused projections
    steps = Counter(q.spec.bits for q in weights.values() for _ in q.step)
    assert steps == {4: 72, 8: 2}

    activations = Counter(replace(q.spec, grad_scale="numel") for q in found if q.layout.batched)
    assert activations == {
        LSQ(4): 72,
        LSQ(4, signed=False): 12,  # softmax
        LSQ(4, signed=False, offset=True): 12,  # GELU
        LSQ(8): 2,  # image and head
    }
    assert all(q.step.numel() == 1 for q in found if q.layout.batched)

    sizes = Counter()
    for name, quantizer in weights.items():
        sizes[quantizer.spec.bits] += model.get_parameter(name.removesuffix("_quant")).numel()
    assert sizes == {4: 5_308_416, 8: 339_456}
    assert sum(p.numel() for p in model.parameters()) == 5_717_416 + 74 + 98 + 12


@pytest.mark.parametrize(
    ("match", "spec", "message"),
    [
        ("*.qkv.weight_quant", LogIntSoftmax(4), "takes the place of a softmax"),
        ("*.q_quant", LogIntSoftmax(4), "takes the place of a softmax"),
        ("*.qkv.weight_quant", LogSqrt2(4), "weights are negative too"),
        ("*.qkv.weight_quant", BitLog2(4), "weights are negative too"),
        ("*.qkv.weight_quant", LSQ(4, signed=False), "weights are negative too"),
    ],
    ids=repr,
)
def test_a_quantizer_that_makes_no_sense_at_a_site_is_refused(match, spec, message):
    with pytest.raises(QatError, match=message):
        quantize(tiny(), [Rule(match, spec)])
