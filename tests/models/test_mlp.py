"""Gated MLPs against timm's own. Shapes: B batch, N tokens, C channels, F hidden."""

from __future__ import annotations

import pytest
import torch
from timm.layers import GluMlp, LayerNorm, SwiGLU, SwiGLUPacked
from torch import nn

from qat.errors import QatError
from qat.quantizers import LSQ
from qat.recipe import Rule
from qat.sites.insert import FloatSite, SiteBuilder, quantizers, sites, swapped


def packed(**arguments: object) -> GluMlp:
    return SwiGLUPacked(6, 16, **arguments)


@pytest.mark.parametrize(
    "build",
    [
        packed,
        lambda: packed(norm_layer=LayerNorm, bias=False),
        lambda: GluMlp(6, 16, gate_last=True),
        lambda: SwiGLU(6, 8, norm_layer=LayerNorm),
        lambda: SwiGLU(6, 8, bias=False),
    ],
    ids=["packed", "packed_norm", "gate_last", "separate_norm", "separate"],
)
@torch.no_grad()
def test_without_quantizers_it_is_the_mlp_of_timm(build):
    torch.manual_seed(0)
    mlp, x = build().eval(), torch.randn(2, 3, 6)
    expected, names = mlp(x), set(mlp.state_dict())
    ours = swapped(mlp, SiteBuilder([]))
    assert torch.equal(ours(x), expected)
    assert names <= set(ours.state_dict())
    assert all(type(site) is FloatSite for _, site in sites(ours))


@torch.no_grad()
def test_the_second_layer_reads_the_quantized_product_of_gate_and_value():
    torch.manual_seed(0)
    mlp, x = packed().eval(), torch.randn(2, 3, 6)
    gate, value = mlp.fc1(x).chunk(2, -1)
    product = nn.functional.silu(gate) * value
    ours = swapped(mlp, SiteBuilder([Rule("fc2.gated.input_quant", LSQ(4))]))
    ((name, quantizer),) = quantizers(ours)
    assert name == "fc2.gated.input_quant"
    quantizer.step.fill_(0.05)
    codes = (product / 0.05).clamp(-8, 7).round()
    torch.testing.assert_close(ours(x), mlp.fc2(codes * 0.05))
    assert (codes < 0).any()
    assert (codes > 0).any()


def test_rules_for_the_output_of_gelu_do_not_match_a_product():
    gelu = Rule("*.mlp.fc2.input_quant", LSQ(4, signed=False, offset=True))
    builder = SiteBuilder([Rule("*.input_quant", LSQ(4)), gelu], "blocks.0.mlp.")
    specs = {name: quantizer.spec for name, quantizer in quantizers(swapped(packed(), builder))}
    assert specs == {"fc1.input_quant": LSQ(4), "fc2.gated.input_quant": LSQ(4)}


def test_a_layer_without_a_bias_loads_weights_without_one():
    ours, state = swapped(packed(bias=False), SiteBuilder([])), packed(bias=False).state_dict()
    ours.load_state_dict(state, strict=True)
    assert not ours.fc2.bias.any()


def test_convolutions_in_place_of_layers_are_refused_by_name():
    with pytest.raises(QatError, match=r"blocks\.0\.mlp\.fc1 is a Conv2d: only Linear is reproduced"):
        swapped(packed(use_conv=True), SiteBuilder([], "blocks.0.mlp."))
