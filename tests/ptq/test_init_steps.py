"""Calibration from samples of each tensor: what it changes, and what it leaves alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import build_float
from qat.ptq import InitSteps
from qat.quantizers import LSQ
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def tiny(*rules: Rule) -> nn.Module:
    torch.manual_seed(0)
    model = build_float("deit_tiny_patch16_224", None, 10, TINY).eval()
    return quantize(model, rules or build_recipe("vvtq", w_bits=4, a_bits=4))


def batches(count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(count)]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of every quantizer."""
    return {
        f"{name}.{key}": parameter.detach().clone()
        for name, quantizer in quantizers(model)
        for key, parameter in quantizer.named_parameters()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_site_is_filled_and_no_hook_stays():
    model = tiny()
    InitSteps()(model, batches())
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))
    assert all((quantizer.step > 0).all() for _, quantizer in quantizers(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_only_quantizers_change():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    InitSteps()(model, batches())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == values(model).keys()
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_gives_the_same_steps_and_another_seed_others():
    def run(seed: int) -> dict[str, Tensor]:
        model = tiny()
        InitSteps(samples=200, seed=seed)(model, batches())
        return values(model)

    assert same(run(0), run(0))
    assert not same(run(0), run(1))


def test_the_result_loads_strictly_into_a_model_built_afresh():
    model, fresh = tiny(), tiny()
    InitSteps()(model, batches())
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(batches()[0]), model(batches()[0]))


def test_a_weight_is_fitted_on_all_of_itself():
    model = tiny(Rule("*.qkv.weight_quant", LSQ(3, granularity="qkv", init="lsq")))
    InitSteps(samples=5)(model, [])  # no activation is quantized, so no image is needed
    qkv = model.blocks[0].attn.qkv
    expected = torch.stack([2 * part.abs().mean() / 3**0.5 for part in qkv.weight.chunk(3)])  # 3 is the largest code
    torch.testing.assert_close(qkv.weight_quant.step, expected)


def test_an_activation_is_fitted_on_what_reaches_it():
    model = tiny(Rule("patch_embed.proj.input_quant", LSQ(4, init="lsq")))
    InitSteps()(model, [torch.full((2, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), -0.5)])
    assert model.patch_embed.proj.input_quant.step.item() == pytest.approx(2 * 0.5 / 7**0.5)


def test_activations_are_those_of_the_float_model():
    coarse, fine = tiny(*build_recipe("lsq", w_bits=2, a_bits=4)), tiny(*build_recipe("lsq", w_bits=8, a_bits=4))
    for model in (coarse, fine):
        InitSteps()(model, batches())
    found = {name: value for name, value in values(fine).items() if "weight_quant" not in name}
    assert same(found, {name: value for name, value in values(coarse).items() if name in found})


def test_a_tensor_smaller_than_the_sample_is_seen_whole():
    model = tiny(Rule("head.input_quant", LSQ(8, init="percentile", percentile=100)))
    seen = []
    model.head.input_quant.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    InitSteps()(model, batches(1))
    assert model.head.input_quant.step.item() == pytest.approx(seen[0].abs().max().item() / 127)


def test_flags_and_hooks_are_put_back_after_an_error():
    def failing():
        yield batches()[0]
        raise OSError("the disk is gone")

    model = tiny()
    model.head.input_quant.enabled = False
    with pytest.raises(OSError, match="disk"):
        InitSteps()(model, failing())
    flags = {name: quantizer.enabled for name, quantizer in quantizers(model)}
    assert [name for name, enabled in flags.items() if not enabled] == ["head.input_quant"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sites_that_are_calibrated_are_left_alone():
    model = tiny()
    with torch.no_grad():
        model.head.input_quant.step.fill_(0.125)
        model.head.weight_quant.step.fill_(0.25)
    InitSteps()(model, batches())
    assert model.head.input_quant.step.item() == 0.125
    assert model.head.weight_quant.step.item() == 0.25
    again = values(model)
    InitSteps(seed=1)(model, [])  # nothing is left to do, so no image is needed
    assert same(values(model), again)


def test_a_site_that_no_image_reaches_is_named():
    with pytest.raises(
        QatError, match=r"no calibration image reached 'patch_embed.proj.input_quant'.*calibration.images"
    ):
        InitSteps()(tiny(), [])
