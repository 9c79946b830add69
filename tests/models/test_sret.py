"""The quantized SReT: blocks that are applied twice, and evaluation that depends on nothing but the image."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import attention, layers
from qat.ptq import InitSteps
from qat.quantizers import LSQ
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers, switched_off
from tests.models.sret_weights import images, tiny


def calibrated(**arguments) -> nn.Module:
    model = quantize(tiny(**arguments), build_recipe("vvtq", w_bits=4, a_bits=4))
    InitSteps()(model, [images(4)])
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.stages[1].blocks.__setitem__(1, nn.Identity()), r"stages\.1\.blocks\.1 is a Identity"),
        (lambda m: setattr(m.stages[0].blocks[0], "attn", nn.Identity()), r"stages\.0\.blocks\.0\.attn is a Identity"),
    ],
)
def test_a_block_or_attention_of_another_class_is_refused(change, message):
    model = tiny()
    change(model)
    with pytest.raises(QatError, match=message):
        quantize(model, [])


@pytest.mark.parametrize("mode", ["portable", "identity", 3])
@torch.no_grad()
def test_evaluation_depends_on_the_image_alone(mode):
    model = calibrated(eval_permutation=mode).double()
    x = images(4).double()
    before = torch.get_rng_state()
    logits = model(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x.flip(0)).flip(0), logits)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), logits)


@torch.no_grad()
def test_the_order_in_evaluation_can_be_changed():
    model = calibrated()
    before = model(images())
    model.set_eval_permutation(1)
    assert not torch.equal(model(images()), before)
    model.set_eval_permutation("portable")
    assert torch.equal(model(images()), before)


@torch.no_grad()
def test_calibration_sees_both_applications():
    model, largest = quantize(tiny(), [Rule("*.input_quant", LSQ(8, init="percentile", percentile=100))]), {}
    for name, quantizer in quantizers(model):
        quantizer.register_forward_pre_hook(
            lambda _, args, name=name: largest.setdefault(name, []).append(args[0].abs().max())
        )
    with switched_off([quantizer for _, quantizer in quantizers(model)]):
        model(images())
    seen = copy.deepcopy(largest)
    InitSteps()(model, [images()])
    for name, quantizer in quantizers(model):
        assert len(seen[name]) == (2 if ".blocks." in name else 1)
        torch.testing.assert_close(quantizer.step[0], max(seen[name]) / 127)
    assert any(values[0] != max(values) for values in seen.values())


def test_calibration_draws_the_same_values_every_time():
    first, second = (quantize(tiny(), build_recipe("vvtq", w_bits=4, a_bits=4)) for _ in range(2))
    for model in (first, second):
        InitSteps(samples=50)(model, [images(4)])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_gradients_of_both_applications_are_added(monkeypatch):
    """Also where operands are computed again: the gradients are those of a model that keeps everything."""

    def keep_everything(op, *operands: tuple[nn.Module, Tensor]) -> Tensor:
        return op(*(site(x) for site, x in operands))

    model, grads = calibrated(), []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(attention, "recompute_operands", keep_everything)
            monkeypatch.setattr(layers, "recompute_operands", keep_everything)
        model.zero_grad()
        model(images()).square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())
