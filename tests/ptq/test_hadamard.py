"""Rotated heads: the matrices, and float models that stay the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.hadamard import hadamard, has_hadamard, rotatable, rotate_heads
from qat.recipe import build_recipe
from qat.sites.insert import quantize, quantizers, switched_off
from tests.contracts.family_cases import MODELS, TINY, TINY_SRET, TINY_SWIN
from tests.contracts.test_families import float_model, images
from tests.models.perturbed import perturbed

ROTATED: dict[str, tuple[str, dict[str, Any]]] = {
    name: MODELS[name] for name in ("deit", "distilled", "no_bias", "clip")
}
ROTATED["wide"] = ("vit_tiny_patch16_224", {**TINY, "num_heads": 2})  # D = 12, whose matrix is not symmetric
ROTATED["swin"] = (MODELS["swin"][0], {**TINY_SWIN, "num_heads": (1, 6)})  # D = 12 and 4
ROTATED["sret"] = (MODELS["sret"][0], {**TINY_SRET, "num_heads": (3, 6)})


def attentions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if any(rotatable(module))]


def assert_same(logits: Tensor, expected: Tensor) -> None:
    assert (logits - expected).norm() <= 1e-5 * expected.norm()  # weights are rounded to float32 again


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 32, 64, 96, 160])
def test_a_matrix_is_orthonormal_and_spreads_every_channel_evenly(size):
    R = hadamard(size)
    assert has_hadamard(size)
    torch.testing.assert_close(R @ R.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)  # float64
    assert torch.equal(R.abs(), torch.full_like(R, size**-0.5))


def test_the_first_matrices_by_hand():
    assert (hadamard(4) * 2).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    rows = (hadamard(12) * 12**0.5).round()
    assert rows[0].tolist() == [1] * 12
    assert rows[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]  # squares mod 11 are 1, 3, 4, 5, 9; 0 - j


@pytest.mark.parametrize("size", [0, 3, 6, 28, 36, 60, 144])
def test_other_sizes_are_refused(size):
    assert not has_hadamard(size)
    with pytest.raises(QatError, match=f"no rotation of width {size} here"):
        hadamard(size)


def random_model(name: str) -> nn.Module:
    arch, arguments = ROTATED[name]
    return perturbed(arch, **arguments)


@pytest.mark.parametrize("name", ROTATED)
@torch.no_grad()
def test_the_float_model_stays_as_it_is(name):
    model = quantize(random_model(name), build_recipe("vvtq", w_bits=4, a_bits=4))
    before = copy.deepcopy({key: value for key, value in model.state_dict().items() if "_quant." not in key})
    with switched_off([quantizer for _, quantizer in quantizers(model)]):
        expected = model(images())
        places = attentions(model)
        for place in places:
            rotate_heads(model, place)
        assert_same(model(images()), expected)
    assert len(places) == {"swin": 4, "sret": 3}.get(name, 2)
    changed = {key for key, value in before.items() if not torch.equal(value, model.state_dict()[key])}
    kinds = ["qkv.weight", "proj.weight"] + ["qkv.bias"] * (name != "no_bias")
    assert changed == {f"{place}.{kind}" for place in places for kind in kinds}


@torch.no_grad()
def test_a_channel_that_stands_out_is_spread_over_its_head():
    model = quantize(float_model("deit"), [])
    attn = model.get_submodule("blocks.0.attn")
    rows = attn.qkv.weight.view(3, 3, 8, 24)
    rows.fill_(0)
    rows[:, 1, 2] = 8**0.5
    rotate_heads(model, "blocks.0.attn")
    assert not rows[:, [0, 2]].any()
    torch.testing.assert_close(rows[:, 1].abs(), torch.ones(3, 8, 24))


@torch.no_grad()
def test_what_a_norm_changes_is_left_as_it_is():
    model = quantize(float_model("query_key_norm"), [])
    attn = model.get_submodule("blocks.0.attn")
    assert rotatable(attn) == (False, True)
    expected, before = model(images()), attn.qkv.weight.clone()
    rotate_heads(model, "blocks.0.attn")
    assert_same(model(images()), expected)
    assert torch.equal(attn.qkv.weight[:48], before[:48])  # of q and k
    assert not torch.equal(attn.qkv.weight[48:], before[48:])

    model = quantize(float_model("inner_norms"), [])
    assert rotatable(model.get_submodule("blocks.0.attn")) == (True, False)
    expected, before = model(images()), model.get_parameter("blocks.0.attn.proj.weight").clone()
    rotate_heads(model, "blocks.0.attn")
    assert_same(model(images()), expected)
    assert torch.equal(model.get_parameter("blocks.0.attn.proj.weight"), before)


def test_refusals_name_the_attention():
    model = quantize(float_model("swin"), [])
    with pytest.raises(QatError, match=r"layers\.0\.blocks\.0\.attn: heads of width 6 cannot be rotated"):
        rotate_heads(model, "layers.0.blocks.0.attn")
    model = quantize(float_model("eva02"), [])
    assert not attentions(model)
    with pytest.raises(QatError, match=r"blocks\.0\.attn: the heads of this QuantRotaryAttention cannot be rotated"):
        rotate_heads(model, "blocks.0.attn")
