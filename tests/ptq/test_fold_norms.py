"""The fold of norms as a step: which norms, from which ranges. `test_repq_vit` has the worked example."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.fold_norms import FoldNorms
from qat.ptq.steps import Steps
from qat.ptq.tensor_search import TensorSearch
from qat.quantizers import LSQ, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.hooks import watching
from qat.sites.insert import quantize, quantizers, switched_off
from tests.contracts.test_families import float_model, images
from tests.ptq.test_output_search import batches, tiny

UNIFORM = build_recipe("uniform", w_bits=4, a_bits=4)
NORMS = {f"blocks.{i}.norm{j}.{kind}" for i in (0, 1) for j in (1, 2) for kind in ("weight", "bias")}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of weights and biases that are others now."""
    now = model.state_dict()
    return {name for name, x in before.items() if name.endswith(("weight", "bias")) and not torch.equal(x, now[name])}


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("shares", [None, [0.99, 0.999]])
@torch.no_grad()
def test_norms_and_their_readers_change_and_the_float_model_does_not(shares, optional):
    model = tiny()
    with torch.no_grad():
        model.blocks[1].norm1.bias[3] = 20.0  # a channel that stands out
    before, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    FoldNorms(shares=shares, optional=optional)(model, batches())
    readers = {f"blocks.{i}.{layer}.{kind}" for i in (0, 1) for layer in ("attn.qkv", "mlp.fc1") for kind in (
        "weight", "bias")}  # fmt: skip
    assert changed(model, before) == NORMS | readers
    assert model.blocks[1].norm1.bias[3].abs() < 5, "it fits into the range of the others"
    off = [q for m in (model, plain) for _, q in quantizers(m)]
    with switched_off(off):
        torch.testing.assert_close(model(images()), plain(images()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
@torch.no_grad()
def test_a_part_of_the_differences_is_moved_and_all_channels_lie_around_one_middle(strength):
    model = tiny("deit", Rule("*.input_quant", Uniform(8)))
    model.blocks[0].norm1.weight[3] = 20.0
    model.blocks[0].norm1.bias[3] = 40.0
    plain = copy.deepcopy(model)
    FoldNorms(shares=[1.0], strength=strength)(model, batches())
    with switched_off(q for m in (model, plain) for _, q in quantizers(m)):
        torch.testing.assert_close(model(images()), plain(images()), atol=1e-4, rtol=1e-4)
        x, before = (norm_output(m) for m in (model, plain))
    width, wide = (y.amax((0, 1)) - y.amin((0, 1)) for y in (x, before))
    step = wide / 255
    torch.testing.assert_close(width, wide / (step / step.mean()) ** strength, rtol=0.01, atol=0)
    site = model.blocks[0].attn.qkv.input_quant
    middle = (127.5 - site.zero_point) * site.step
    half = (x.amax((0, 1)) + x.amin((0, 1))) / 2 - middle
    assert (half.abs() <= step / (step / step.mean()) ** strength).all(), "zero points are whole numbers of steps"


def norm_output(model: nn.Module) -> Tensor:
    """Of the first norm, for the calibration images."""
    seen: list[Tensor] = []
    with watching({"": model.blocks[0].norm1}, after=lambda _, args, out: seen.append(out)):
        for x in batches():
            model(x)
    return torch.cat(seen)


@torch.no_grad()
def test_a_channel_that_stands_out_costs_less_when_it_is_folded():
    errors = []
    for steps in ([TensorSearch()], [FoldNorms(), TensorSearch()]):
        model = tiny("deit", Rule("*.qkv.input_quant", Uniform(4)), Rule("*.fc1.input_quant", Uniform(4)))
        model.blocks[0].norm1.weight[3] = 20.0
        with switched_off([quantizer for _, quantizer in quantizers(model)]):
            exact = model(batches()[0])
        Steps(steps)(model, batches())
        errors.append((model(batches()[0]) - exact).square().mean())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("spec", [None, LSQ(4), Uniform(4, granularity="channel")], ids=repr)
def test_readers_without_a_single_zero_point_are_left_out_or_refused(spec):
    rule = Rule("blocks.1.mlp.fc1.input_quant", spec)
    model = tiny("deit", *UNIFORM, rule)
    with pytest.raises(QatError, match=r"FoldNorms needs Uniform, granularity tensor, at 'blocks\.1\.mlp\.fc1\.input"):
        FoldNorms()(model, batches())
    before = copy.deepcopy(model.state_dict())
    FoldNorms(optional=True)(model, batches())
    norms = {name for name in changed(model, before) if "norm" in name}
    assert norms == NORMS - {"blocks.1.norm2.weight", "blocks.1.norm2.bias"}


@pytest.mark.parametrize("name", ["aimv2", "post_norm"])
def test_a_model_without_norms_to_fold_is_refused_or_left_as_it_is(name):
    model = quantize(float_model(name), UNIFORM)
    with pytest.raises(QatError, match=r"FoldNorms rewrites LayerNorms that .* this model has none"):
        FoldNorms()(model, batches())
    before = copy.deepcopy(model.state_dict())
    FoldNorms(optional=True)(model, batches())
    assert not changed(model, before)
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))


@pytest.mark.parametrize("site", ["input_quant", "weight_quant"])
def test_norms_of_calibrated_readers_stay(site):
    model = tiny()
    quantizer = model.get_submodule(f"blocks.0.attn.qkv.{site}")
    quantizer.set_range_(torch.full_like(quantizer.step, -1), torch.full_like(quantizer.step, 1))
    before, step = copy.deepcopy(model.state_dict()), quantizer.step.clone()
    FoldNorms()(model, batches())
    assert {name for name in changed(model, before) if "norm" in name} == NORMS - {
        "blocks.0.norm1.weight", "blocks.0.norm1.bias"}  # fmt: skip
    assert torch.equal(quantizer.step, step)


def test_weights_in_floating_point_do_not_matter():
    model = tiny("deit", Rule("*.input_quant", Uniform(4)))
    before = copy.deepcopy(model.state_dict())
    FoldNorms()(model, batches())
    assert {name for name in changed(model, before) if "norm" in name} == NORMS


def test_options_that_are_no_upper_ends_are_refused():
    with pytest.raises(QatError, match=r"FoldNorms: shares is empty: give quantiles above 0.5 and at most 1"):
        FoldNorms(shares=[])
    with pytest.raises(QatError, match="FoldNorms: strength is 2"):
        FoldNorms(strength=2.0)
    with pytest.raises(QatError, match="FoldNorms: samples is 0"):
        FoldNorms(samples=0)
