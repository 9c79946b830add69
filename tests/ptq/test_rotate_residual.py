"""The residual stream rotated: the float model stays what it was, and outliers spread."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import build_float
from qat.ptq import Frontier, RotateResidual, Steps, TensorSearch
from qat.ptq.rotate_residual import REPORT, rotate_residual, rotation
from qat.recipe import build_recipe
from qat.sites.family import family_of
from qat.sites.insert import quantize, quantizers, switched_off

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
WITH_STREAM: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 1e-5}),
    "registers": ("vit_small_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
}
WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "norms at the end of branches": ("vit_tiny_patch16_224", {"block_fn": None}),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def float_model(name: str) -> nn.Module:
    """All parameters at random, so that each of them matters."""
    arch, options = (WITH_STREAM | WITHOUT)[name]
    if options.get("block_fn", 1) is None:
        from timm.models.vision_transformer import ResPostBlock

        options = {"block_fn": ResPostBlock}
    model = build_float(arch, None, 5, {**TINY, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3, generator=generator)
    return model


def quantized(name: str) -> nn.Module:
    return quantize(float_model(name), build_recipe("frontier", w_bits=4, a_bits=4))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    with switched_off(q for _, q in quantizers(model)):
        return model(X)


@pytest.mark.parametrize("size", [2, 24, 192])
def test_the_rotation_is_orthogonal_and_leaves_the_mean_where_it_is(size):
    Q, one = rotation(size, 0), torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(Q @ Q.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(Q @ one, one)
    assert torch.equal(Q, rotation(size, 0))
    assert size == 2 or not torch.equal(Q, rotation(size, 1))


def test_a_rotation_of_three_channels_is_one_about_the_axis_of_ones():
    """Its trace is 1 + 2 cos of an angle, and a vector without a mean keeps its length."""
    Q, x = rotation(3, 5), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    assert float((Q @ x).sum()) == pytest.approx(0, abs=1e-12)
    assert float((Q @ x).norm()) == pytest.approx(2**0.5)


@pytest.mark.parametrize("name", WITH_STREAM)
def test_a_float_model_and_its_quantized_one_stay_what_they_were(name):
    """float32 rounds the weights anew: a few 1e-7 of the logits."""
    for model in (float_model(name), quantized(name)):
        before, weights = logits(model), copy.deepcopy(model.state_dict())
        rotate_residual(model, 0)
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
        stream = family_of(model).stream(model)
        changed = {key for key, value in model.state_dict().items() if not value.equal(weights[key])}
        assert {f"{layer}.weight" for layer in stream.writers} <= changed
        assert set(stream.parameters) <= changed
        norms = [model.get_submodule(norm) for norm, _ in stream.norms]
        assert all(bool((norm.weight == 1).all()) and not norm.bias.any() for norm in norms)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_such_a_stream_is_left_alone_or_refused(name):
    model = quantized(name)
    assert family_of(model).stream(model) is None
    with pytest.raises(QatError, match="RotateResidual finds no residual stream that only LayerNorms read"):
        Steps([RotateResidual(), TensorSearch()])(model, [X])
    method = Steps([RotateResidual(optional=True), TensorSearch()])
    method(model, [X])
    assert REPORT not in method.report


def test_channels_have_one_size_afterwards():
    model = float_model("deit")
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight[3] = block.norm2.weight[3] = 40.0  # an outlier channel
    spreads = []
    for _ in range(2):
        seen: list[Tensor] = []
        hook = model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        model(X)
        hook.remove()
        size = seen[0].flatten(0, 1).square().mean(0).sqrt()
        spreads.append(float(size.max() / size.median()))
        rotate_residual(model, 0)
    assert spreads[0] > 20
    assert spreads[1] < 4


def test_it_is_told_and_an_own_seed_is_used():
    model, other = quantized("deit"), quantized("deit")
    method = Frontier(rounds=1, rows=34)
    method(model, [X])
    assert method.report[REPORT] == 0
    Steps([RotateResidual(seed=3), TensorSearch()])(other, [X])
    rotated = float_model("deit")
    rotate_residual(rotated, 3)
    assert torch.equal(other.get_submodule("norm").weight, rotated.norm.weight)
    assert torch.equal(other.get_parameter("pos_embed"), rotated.pos_embed)


def test_a_model_that_is_calibrated_in_part_is_not_rotated():
    model = quantized("deit")
    TensorSearch()(model, [X])
    weight = model.get_parameter("pos_embed").clone()
    fresh = quantized("deit")
    model.head.weight_quant = fresh.head.weight_quant  # not calibrated
    Steps([RotateResidual(optional=True), TensorSearch()])(model, [X])
    assert torch.equal(model.get_parameter("pos_embed"), weight)


def test_a_reader_without_bias_cannot_take_the_shift_of_its_norm():
    model = build_float("vit_tiny_patch16_224", None, 5, {**TINY, "qkv_bias": False})
    with pytest.raises(QatError, match=r"a reader of 'blocks\.0\.norm1' has no bias"):
        rotate_residual(model, 0)
