"""Attention pooling against timm's own, and its sites. Shapes: B images, N tokens, L queries, C channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import AttentionPoolLatent, LayerNorm
from torch import Tensor, nn

from qat.models.pooling import QuantAttentionPool
from qat.quantizers import LSQ
from qat.recipe import Rule, build_recipe
from qat.sites.insert import SiteBuilder, quantizers
from qat.sites.products import HasProducts


def pool(**arguments: Any) -> AttentionPoolLatent:
    torch.manual_seed(0)
    found = AttentionPoolLatent(12, num_heads=3, mlp_ratio=2.0, norm_layer=LayerNorm, **arguments).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return found


def quantized(found: nn.Module, *rules: Rule) -> QuantAttentionPool:
    return QuantAttentionPool(found, SiteBuilder(rules, "attn_pool.")).eval()


def tokens() -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"latent_len": 3, "pool_type": "avg"},
        {"latent_len": 2, "pool_type": ""},
        {"qk_norm": True, "pos_embed": "abs", "feat_size": 5},
        {"out_features": 0},
    ],
    ids=["siglip", "average", "unpooled", "norms", "bare"],
)
@torch.no_grad()
def test_without_quantizers_it_is_the_pool_of_timm(arguments):
    found = pool(**arguments)
    expected = found(tokens())
    state = found.state_dict()
    ours = quantized(found)
    assert torch.equal(ours(tokens()), expected)
    assert ours.state_dict().keys() == state.keys()


def test_recipes_match_its_sites():
    """Those of attention are called as in a block, so that one glob matches both."""
    ours = quantized(pool(), *build_recipe("vvtq", w_bits=4, a_bits=4))
    specs = {name: quantizer.spec for name, quantizer in quantizers(ours)}
    assert not specs["attn.probs_quant"].signed
    assert specs["attn.q_quant"].signed
    assert not specs["mlp.fc2.input_quant"].signed
    assert len(specs) == 5 * 2 + 4


def test_the_products_of_attention_are_counted_by_hand():
    """L = 3 queries, N = 5 tokens and 12 channels: 3 * 5 * 12 for the scores, as much for the mixture."""
    ours: HasProducts = quantized(pool(latent_len=3))
    assert [product.macs((2, 5, 12)) for product in ours.products()] == [2 * 180, 2 * 180]
    assert [(product.left, product.right) for product in ours.products()] == [
        ("attn.q_quant", "attn.k_quant"),
        ("attn.probs_quant", "attn.v_quant"),
    ]


def test_heads_of_keys_and_values_have_steps_of_their_own():
    ours = quantized(pool(), Rule("*.kv.weight_quant", LSQ(4, granularity="head")))
    ((_, quantizer),) = quantizers(ours)
    rows = quantizer.grouped(ours.kv.weight)
    assert rows.shape == (2 * 3, 4 * 12)
    assert torch.equal(rows[4], ours.kv.weight[16:20].flatten())  # the second head of the values
