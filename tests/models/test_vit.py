"""Forms of ViT beyond those of tests/contracts: embeddings, norms of other kinds, biases of BEiT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qat.errors import QatError
from qat.models import param_groups
from qat.quantizers import LSQ, IntegerNorm
from qat.recipe import Rule, build_recipe
from qat.sites.family import family_of
from qat.sites.insert import quantize, quantizers, sites, switched_off
from tests.models.perturbed import perturbed, two_images

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIT, BEIT, AIMV2 = "vit_tiny_patch16_224", "beit_base_patch16_224", "aimv2_large_patch14_224"
WIDE = [Rule("*", LSQ(16))]


def tiny(arch: str = VIT, **arguments: Any) -> nn.Module:
    return perturbed(arch, **{**TINY, **arguments})


@pytest.mark.parametrize(
    ("arch", "arguments", "size"),
    [
        (VIT, {"dynamic_img_size": True}, 48),
        (VIT, {"dynamic_img_size": True, "no_embed_class": True, "reg_tokens": 2}, 48),
        (VIT, {"class_token": False, "global_pool": "avg", "pos_embed": "none"}, 32),
        (BEIT, {"use_abs_pos_emb": True, "use_rel_pos_bias": False}, 32),
    ],
    ids=["any_size", "any_size_registers", "no_positions", "beit_positions"],
)
@torch.no_grad()
def test_the_embedding_is_that_of_timm_with_sites_in_it(arch, arguments, size):
    float_model = tiny(arch, **arguments)
    model = quantize(copy.deepcopy(float_model), WIDE)
    with switched_off(quantizer for _, quantizer in quantizers(model)):
        x = two_images(size)
        expected = float_model(x)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        for unit in family_of(model).units(model):
            x = unit.run(x)
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_position_bias_of_beit_is_the_table_looked_up_by_index():
    float_model = tiny(BEIT)
    expected = [block.attn._get_rel_pos_bias() for block in float_model.blocks]
    model = quantize(float_model, [])
    for block, bias in zip(model.blocks, expected, strict=True):
        assert torch.equal(block.attn.position_bias(), bias)
    assert not [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]


def test_the_position_bias_of_beit_is_not_decayed():
    model = quantize(tiny(BEIT), build_recipe("vvtq", w_bits=4, a_bits=4))
    decayed, *rest = param_groups(model, 0.1, 1e-3, 1e-4)
    tables = {id(p) for name, p in model.named_parameters() if name.endswith("bias_table")}
    if decayed["weight_decay"] == 0:
        decayed = next(group for group in rest if group["weight_decay"])
    assert len(tables) == 2
    assert not tables & {id(p) for p in decayed["params"]}


def test_a_bias_that_blocks_share_is_refused_by_name():
    with pytest.raises(QatError, match="rel_pos_bias: a position bias that all blocks share is not reproduced"):
        quantize(tiny(BEIT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True), [])


@torch.no_grad()
def test_an_rms_norm_has_a_site_and_no_integer_form():
    float_model = tiny(AIMV2)
    expected = float_model.blocks[0].norm1(torch.arange(24.0))
    model = quantize(copy.deepcopy(float_model), [])
    assert torch.equal(model.blocks[0].norm1(torch.arange(24.0)), expected)
    torch.testing.assert_close(expected, torch.arange(24.0) / 180.1667**0.5 * float_model.blocks[0].norm1.weight)
    assert {"patch_embed.norm.output_quant", "norm.output_quant"} <= {name for name, _ in sites(model)}
    assert all(link.norm != "norm" for link in family_of(model).norm_links(model))
    with pytest.raises(QatError, match=r"'norm\.output_quant': IntegerNorm is a LayerNorm, this is an RmsNorm"):
        quantize(float_model, [Rule("norm.output_quant", IntegerNorm(8))])


def test_a_recipe_that_quantizes_before_the_norm_of_queries_only_is_refused():
    with pytest.raises(
        QatError, match=r"'blocks\.0\.attn\.q_quant' is not quantized, but a norm changes q and k after"
    ):
        quantize(tiny(qk_norm=True), build_recipe("uniform_full", w_bits=8, a_bits=8))


def test_dropout_between_a_site_and_a_norm_leaves_the_norm_without_a_source():
    """A norm that computes with integers would read other numbers than those of the site."""
    sources = []
    for rate in (0.0, 0.1):
        model = quantize(tiny("vit_base_patch16_rpn_224", proj_drop_rate=rate), [])
        links = {link.norm: link.source for link in family_of(model).norm_links(model)}
        sources.append((links["blocks.0.norm1"], links["blocks.0.norm2"]))
    assert sources == [("blocks.0.attn.proj.output_quant", "blocks.0.mlp.fc2.output_quant"), (None, None)]


def test_a_parallel_block_has_one_sum_and_an_unsigned_hidden_layer():
    model = quantize(tiny("vit_base_patch16_xp_224"), build_recipe("vvtq", w_bits=4, a_bits=4))
    specs = {name: quantizer.spec for name, quantizer in quantizers(model)}
    assert "blocks.0.joint_residual_quant" in {name for name, _ in sites(model)}
    assert not specs["blocks.0.mlp_out_proj.input_quant"].signed
    assert specs["blocks.0.attn_out_proj.input_quant"].signed
    assert not specs["blocks.0.attn.probs_quant"].signed
