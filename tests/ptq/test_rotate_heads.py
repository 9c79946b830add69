"""The rotation of heads as a step. `test_hadamard` has the matrices and every family."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.rotate_heads import RotateHeads
from qat.ptq.steps import Steps
from qat.ptq.tensor_search import TensorSearch
from qat.quantizers import Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers, switched_off
from tests.contracts.test_families import float_model
from tests.ptq.test_output_search import batches, tiny

UNIFORM = build_recipe("uniform", w_bits=4, a_bits=4)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of weights and biases that are others now."""
    now = model.state_dict()
    return {name for name, x in before.items() if name.endswith(("weight", "bias")) and not torch.equal(x, now[name])}


@torch.no_grad()
def test_every_attention_is_rotated_and_the_float_model_stays():
    model = tiny()
    plain, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    RotateHeads()(model, batches())
    kinds = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight")
    assert changed(model, before) == {f"blocks.{i}.{kind}" for i in (0, 1) for kind in kinds}
    with switched_off([q for m in (model, plain) for _, q in quantizers(m)]):
        torch.testing.assert_close(model(batches()[0]), plain(batches()[0]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_channels_that_stand_out_cost_less_when_heads_are_rotated():
    errors = []
    for steps in ([TensorSearch()], [RotateHeads(), TensorSearch()]):
        model = tiny("deit", Rule("*.attn.q_quant", Uniform(6)))
        qkv = model.blocks[0].attn.qkv
        for factor, channels in ((8, slice(2, 24, 8)), (1 / 8, slice(26, 48, 8))):  # of q, and the same of k
            qkv.weight[channels] *= factor
            qkv.bias[channels] *= factor
        with switched_off([quantizer for _, quantizer in quantizers(model)]):
            exact = model(batches()[0])
        Steps(steps)(model, batches())
        errors.append((model(batches()[0]) - exact).square().mean())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", ["eva02", "grouped_queries"])
def test_a_model_without_such_an_attention_is_refused_or_left_as_it_is(name):
    model = quantize(float_model(name), UNIFORM)
    with pytest.raises(QatError, match="RotateHeads finds no attention that it can rotate in this model: leave it out"):
        RotateHeads()(model, batches())
    before = copy.deepcopy(model.state_dict())
    RotateHeads(optional=True)(model, batches())
    assert not changed(model, before)
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))


def test_widths_without_a_matrix_are_left_out():
    """The heads of the first stage of this Swin are 6 wide, which has none, and so are those of the second."""
    model = tiny("swin")
    with pytest.raises(QatError, match="RotateHeads finds no attention"):
        RotateHeads()(model, batches())


@pytest.mark.parametrize("site", ["qkv.weight_quant", "q_quant", "proj.weight_quant"])
def test_an_attention_with_a_calibrated_site_stays(site):
    model = tiny()
    quantizer = model.get_submodule(f"blocks.0.attn.{site}")
    quantizer.set_range_(torch.full_like(quantizer.step, -1), torch.full_like(quantizer.step, 1))
    before = copy.deepcopy(model.state_dict())
    RotateHeads()(model, batches())
    assert {name.split(".attn")[0] for name in changed(model, before)} == {"blocks.1"}


def test_an_attention_in_floating_point_stays():
    model = tiny("deit", *UNIFORM, Rule("blocks.1.attn.*", None))
    before = copy.deepcopy(model.state_dict())
    RotateHeads()(model, batches())
    assert {name.split(".attn")[0] for name in changed(model, before)} == {"blocks.0"}
