"""EVA: rotary positions, their sites, sizes of images, and what is refused. Shapes: B images, H heads, N tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.eva import grid_of, rotation
from qat.ptq import Observe
from qat.quantizers import LSQ, Quantizer
from qat.recipe import Rule, build_recipe
from qat.sites.describe import cost
from qat.sites.family import family_of
from qat.sites.insert import FloatSite, quantize, quantizers, sites, switched_off
from tests.models.perturbed import perturbed, two_images

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DINOV3, EVA02, MIXED = (
    "vit_small_plus_patch16_dinov3_qkvb",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224",
)
EIGHT = {"class_path": "Uniform", "init_args": {"bits": 8, "zero": "code"}}


def tiny(arch: str = DINOV3, **arguments: Any) -> nn.Module:
    return perturbed(arch, **{**TINY, **arguments})


@pytest.mark.parametrize("arch", [DINOV3, EVA02])
@torch.no_grad()
def test_the_sites_of_q_and_k_see_rotated_patches_and_other_tokens_as_they_are(arch):
    model = quantize(tiny(arch), [])
    seen: dict[str, Tensor] = {}
    attn = model.blocks[0].attn
    for name in ("q_quant", "k_quant"):
        getattr(attn, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    attn.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(two_images())
    rope, T = rotation(model, (4, 4)), model.num_prefix_tokens
    for name, plain in zip(("q_quant", "k_quant"), attn.heads(seen["x"])[:2], strict=True):
        assert torch.equal(seen[name][:, :, :T], plain[:, :, :T])
        turned = apply_rot_embed_cat(plain[:, :, T:], rope, half=attn.rotate_half)
        assert torch.equal(seen[name][:, :, T:], turned)
        assert not torch.allclose(turned, plain[:, :, T:], atol=0.1)


@torch.no_grad()
def test_a_rotation_turns_pairs_of_channels_by_hand():
    """With half rotation, channel i goes with channel i + D / 2: (a, b) to (a cos - b sin, b cos + a sin)."""
    model = quantize(tiny(), [])
    attn, rope = model.blocks[0].attn, rotation(model, (4, 4))
    q = torch.randn(1, 3, 5 + 16, 8, generator=torch.Generator().manual_seed(2))
    sin, cos = (part[:, :4] for part in rope.chunk(2, -1))  # (16, 4) each
    a, b = q[:, :, 5:, :4], q[:, :, 5:, 4:]
    expected = torch.cat([q[:, :, :5], torch.cat([a * cos - b * sin, b * cos + a * sin], -1)], 2)
    torch.testing.assert_close(attn._rotated(q, rope), expected)


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_images_of_another_size_than_that_of_the_model(quantized):
    """DINOv3 takes any size; its units find the grid by the number of tokens."""
    rules = [Rule("*", LSQ(16, init="percentile"))] if quantized else []
    float_model = tiny(use_abs_pos_emb=True)
    model = quantize(copy.deepcopy(float_model), rules)
    for size in ((48, 48), (32, 32)):
        with switched_off(quantizer for _, quantizer in quantizers(model)):
            found = x = two_images(*size)
            for unit in family_of(model).units(model):
                x = unit.run(x)
            assert torch.equal(x, model(found))
            torch.testing.assert_close(x, float_model(found), atol=1e-5, rtol=1e-5)


def test_a_grid_that_is_neither_square_nor_that_of_the_model_is_refused():
    model = tiny(img_size=(32, 48))
    assert grid_of(model, 5 + 24) == (4, 6)
    assert grid_of(model, 5 + 9) == (3, 3)
    with pytest.raises(QatError, match="15 patches are neither a grid of 4 x 6 nor a square: give square images"):
        grid_of(model, 5 + 15)


@torch.no_grad()
def test_mixed_axes_rotate_every_block_by_itself():
    model = quantize(tiny(MIXED), [])
    rope = rotation(model, (4, 4))
    assert len(rope) == 2
    assert not torch.equal(rope[0], rope[1])
    embedding = family_of(model).units(model)[0]
    assert "rope.freqs" in dict(embedding.named_parameters(model))


def test_a_model_without_positions_has_no_sites_for_them():
    names = [name for name, _ in sites(quantize(tiny(), []))]
    assert "embed_quant" in names
    assert not {"tokens_quant", "pos_embed_quant"} & set(names)


def test_the_gate_and_the_value_have_sites_and_their_product_is_signed():
    model = quantize(tiny(), build_recipe("vvtq", w_bits=4, a_bits=4))
    specs = {name: quantizer.spec for name, quantizer in quantizers(model)}
    for layer in ("fc1_g", "fc1_x"):
        assert specs[f"blocks.0.mlp.{layer}.input_quant"].signed
        assert specs[f"blocks.0.mlp.{layer}.weight_quant"].bits == 4
    assert specs["blocks.0.mlp.fc2.gated.input_quant"] == specs["blocks.0.mlp.fc1_x.input_quant"]
    assert "blocks.0.mlp.fc2.input_quant" not in specs


def test_bit_operations_count_every_product():
    """C = 24 channels, N = 21 tokens, 64 hidden, at 2 bits but for the first and the last layer, which have 8."""
    model = quantize(tiny(), build_recipe("vvtq", w_bits=2, a_bits=2))
    C, N, hidden = 24, 21, model.blocks[0].mlp.fc2.in_features
    block = N * C * 4 * C + 2 * N * N * C + N * 3 * C * hidden
    ends = 16 * 3 * 8 * 8 * C + C * 10
    assert cost(model, 32).bit_operations == 4 * 2 * block + 64 * ends


@pytest.mark.parametrize("recipe", ["uniform_full", "fq_vit_888"])
@torch.no_grad()
def test_a_recipe_that_quantizes_before_the_rotation_only_is_refused_and_a_rule_helps(recipe):
    with pytest.raises(QatError, match=r"'blocks.0.attn.q_quant' is not quantized, but rotation.*\[qk\]_quant"):
        quantize(tiny(), build_recipe(recipe, w_bits=8, a_bits=8))
    rule = {"match": "*.attn.[qk]_quant", "spec": EIGHT}
    model = quantize(tiny(), build_recipe(recipe, [rule], w_bits=8, a_bits=8))
    Observe()(model, [two_images()])
    assert float((model(two_images()) - tiny()(two_images())).norm() / tiny()(two_images()).norm()) < 0.1


def test_without_a_rotation_such_a_recipe_needs_no_more():
    model = quantize(tiny("eva_giant_patch14_224"), build_recipe("fq_vit_888", w_bits=8, a_bits=8))
    attention = model.blocks[0].attn
    assert isinstance(attention.q_quant, FloatSite)  # it is the output of the projection, which is quantized
    assert isinstance(attention.projection.output_quant, Quantizer)


class OtherRotation(nn.Module):
    """None of timm's that are reproduced."""


def gated(model: nn.Module) -> nn.Module:
    model.blocks[1].attn.gate = nn.Linear(24, 24)
    return model


def rotated(model: nn.Module) -> nn.Module:
    model.rope = OtherRotation()
    return model


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: gated(tiny()), r"blocks\.1\.attn\.gate: gated attention is not reproduced"),
        (lambda: rotated(tiny()), "rope is a OtherRotation: only timm's RotaryEmbeddingCat, .* are reproduced"),
        (lambda: tiny(EVA02, patch_drop_rate=0.5), "patch_drop_rate: with quantized tokens .* leave it out"),
    ],
    ids=["gated", "rotation", "patch_drop"],
)
def test_what_is_not_reproduced_is_refused_by_name(build, named):
    with pytest.raises(QatError, match=named):
        quantize(build(), [Rule("*", LSQ(4))])


def test_dropped_patches_keep_their_rotation_where_the_embedding_is_float():
    float_model = tiny(EVA02, patch_drop_rate=0.5).train()
    model = quantize(copy.deepcopy(float_model), [])
    for seeded in (float_model, model):
        torch.manual_seed(5)
        seeded.found = seeded(two_images())
    torch.testing.assert_close(model.found, float_model.found)


@pytest.mark.skipif(not hasattr(tiny("vit_pe_core_base_patch16_224").blocks[0].attn, "num_kv_heads"), reason="old timm")
def test_grouped_queries_share_keys_and_values():
    arguments = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2}
    model = quantize(
        tiny("vit_base_patch16_sapiens2", **arguments), [Rule("*.attn.[qk]_quant", LSQ(4, granularity="head"))]
    )
    groups = {name: quantizer.layout.groups for name, quantizer in quantizers(model)}
    assert (groups["blocks.0.attn.q_quant"], groups["blocks.0.attn.k_quant"]) == (4, 2)
