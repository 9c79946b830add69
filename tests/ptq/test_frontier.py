"""The most accurate calibration, as a whole, on tiny models."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import build_float
from qat.ptq import RepQViT
from qat.ptq.base import PTQMethod
from qat.ptq.frontier import Frontier
from qat.ptq.steps import check_order
from qat.quantizers import AdaLog, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers, switched_off, weights
from tests.contracts.family_cases import DISTILLED, MODELS, TINY
from tests.ptq.test_output_search import MODELS as SMALL
from tests.ptq.test_output_search import batches

CASES = {"vit": MODELS["deit"], "distilled": (DISTILLED, TINY), **SMALL, "rms_norm": MODELS["aimv2"]}
CASES |= {"siglip": MODELS["siglip"], "clip": MODELS["clip"]}  # a pool with an attention; an embedding without a bias
del CASES["deit"]
QUICK = Frontier(rounds=1, rows=64)


def tiny(name: str, bits: int = 3, *rules: Rule) -> nn.Module:
    arch, arguments = CASES[name]
    torch.manual_seed(0)
    model = build_float(arch, None, 10, arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return quantize(model, [*build_recipe("frontier", w_bits=bits, a_bits=bits), *rules])


def calibrated(name: str, method: PTQMethod, images: list[Tensor], bits: int = 3) -> tuple[nn.Module, Tensor]:
    """The model, and its relative error on other images."""
    model, other = tiny(name, bits), batches(1, 16, seed=9)[0]
    with torch.no_grad():
        with switched_off(quantizer for _, quantizer in quantizers(model)):
            exact = model(other)
        method(model, images)
        return model, (model(other) - exact).norm() / exact.norm()


@pytest.mark.parametrize("name", CASES)
def test_every_site_is_filled_and_weights_lie_on_their_grids(name):
    model, _ = calibrated(name, QUICK, batches(2, 2))
    assert all(quantizer.calibrated and quantizer.enabled for _, quantizer in quantizers(model))
    pads = [x for x, m in model.named_modules() if getattr(m, "options", {}).get("padding", (0, 0)) != (0, 0)]
    for site in weights(model):
        if site.name.rpartition(".")[0] not in pads and site.name.endswith(".weight_quant"):
            assert torch.equal(site.quantizer(site.weight), site.weight), site.name
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_same_images_give_the_same_model_bit_for_bit(name):
    first, second = (calibrated(name, Frontier(rounds=1, rows=16), batches(1, 2))[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("bits", [3, 4])
def test_unseen_images_are_closer_to_the_float_model_than_after_repq_vit(bits):
    images = batches(2, 16)
    (_, error), (_, plain) = (calibrated("vit", method, images, bits) for method in (Frontier(rounds=1), RepQViT()))
    assert error < 0.9 * plain


def test_the_recipe_has_logarithms_for_softmax_and_gelu_and_heads_of_their_own():
    model = tiny("vit", 4)
    block = {name.removeprefix("blocks.0."): q for name, q in quantizers(model) if name.startswith("blocks.0.")}
    assert block["attn.probs_quant"].spec == AdaLog(4, granularity="head")
    assert block["mlp.fc2.input_quant"].spec == AdaLog(4, shifted=True)
    assert block["attn.q_quant"].spec == block["attn.v_quant"].spec == Uniform(4, granularity="head")
    assert {q.spec.levels for _, q in quantizers(model)} == {16, 256}
    assert [name for name, q in quantizers(model) if q.spec.levels == 256] == ["patch_embed.proj.input_quant"]
    assert {type(q.spec) for name, q in quantizers(tiny("rms_norm")) if "fc2.gated" in name} == {Uniform}


def test_its_options_reach_its_steps():
    method = Frontier(rounds=4, rows=77, damping=0.7, importance=0.5)
    steps = {type(step).__name__: step for step in method.steps()}
    names = ["RotateResidual", "RotateHeads", "FoldNorms", "TensorSearch", "OutputSearch", "Ridge", "GPTQ"]
    assert list(steps) == names
    check_order(method.steps())
    assert (steps["OutputSearch"].rounds, steps["OutputSearch"].rows, steps["GPTQ"].damping) == (4, 77, 0.7)
    assert steps["RotateHeads"].optional
    assert steps["FoldNorms"].optional
    models = [calibrated("vit", Frontier(rounds=1, rows=64, importance=share), batches())[0] for share in (0.0, 0.5)]
    assert not torch.equal(*(model.blocks[1].mlp.fc2.weight for model in models))


def test_an_interrupt_leaves_no_trace():
    model = tiny("vit")
    before = copy.deepcopy(model.state_dict())
    model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        QUICK(model, batches())
    after = model.state_dict()
    assert all(torch.equal(x.nan_to_num(7e9), after[name].nan_to_num(7e9)) for name, x in before.items())


@pytest.mark.parametrize("option", [{"rounds": 0}, {"rows": 0}, {"damping": 0.0}, {"importance": 1.5}], ids=str)
def test_an_option_out_of_range_is_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(QatError, match=f"Frontier: {name} is {value}"):
        Frontier(**option)
