"""PTQ4ViT as a whole, on tiny models."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import build_float
from qat.ptq import Observe
from qat.ptq.ptq4vit import PTQ4ViT
from qat.quantizers import TwinGelu, TwinSoftmax, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers, sites, switched_off
from tests.ptq.test_apq_vit import MODELS


def tiny(name: str, recipe: str = "ptq4vit", bits: int = 4, *rules: Rule) -> nn.Module:
    arch, arguments = MODELS[name]
    torch.manual_seed(0)
    model = build_float(arch, None, 10, arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return quantize(model, build_recipe(recipe, [rule.to_dict() for rule in rules], w_bits=bits, a_bits=bits))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(10, 3, 32, 32, generator=generator), torch.randn(6, 3, 32, 32, generator=generator)]


def error(model: nn.Module) -> float:
    """Relative error of the logits of the calibration images."""
    images = torch.cat(batches())
    with torch.no_grad():
        found = model(images)
        with switched_off(q for _, q in quantizers(model)):
            exact = model(images)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("recipe", ["ptq4vit", "ptq4vit_released"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_complete_and_closer_to_the_float_model_than_with_full_ranges(name, recipe):
    """On random weights, the gradients of 16 images say little about Swin, so that it gets a little more."""
    model, plain = tiny(name, recipe, 3), tiny(name, recipe, 3)
    weights = {key: value.clone() for key, value in model.state_dict().items() if key in dict(plain.named_parameters())}
    PTQ4ViT(candidates=16, rounds=1)(model, batches())
    Observe(observer="minmax")(plain, batches())
    assert all(quantizer.calibrated and quantizer.enabled for _, quantizer in quantizers(model))
    steps = {f"{key}.step" for key, _ in quantizers(model)}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items() if key not in steps)
    assert error(model) < error(plain) * (1.1 if name == "swin" else 0.95)


def test_the_recipe_is_that_of_the_paper():
    kept = {name: site for name, site in sites(tiny("distilled", bits=6)) if not isinstance(site, nn.Identity)}
    assert "patch_embed.proj.input_quant" not in kept
    block = {name.removeprefix("blocks.0."): q for name, q in kept.items()}
    assert isinstance(block["attn.probs_quant"].spec, TwinSoftmax)
    assert block["mlp.fc2.input_quant"].spec == TwinGelu(6)
    groups = {
        name: block[name].layout.groups for name in ("attn.qkv.weight_quant", "attn.q_quant", "mlp.fc1.weight_quant")
    }
    assert groups == {"attn.qkv.weight_quant": 3, "attn.q_quant": 3, "mlp.fc1.weight_quant": 1}
    assert {"head.input_quant", "head_dist.weight_quant"} <= set(kept)
    plain = {q.spec for name, q in kept.items() if name.endswith("weight_quant")}
    assert {(spec.signed, spec.zero, spec.bits) for spec in plain} == {(True, "none", 6)}


def test_units_are_calibrated_on_what_the_float_model_gives_them():
    """A coarse weight in the first block changes nothing in the second, unless units see quantized ones."""
    coarse = Rule("blocks.0.mlp.fc2.weight_quant", Uniform(2, signed=True, zero="none"))
    for prefix, same in (("float", True), ("quantized", False)):
        models = [tiny("vit"), tiny("vit", "ptq4vit", 4, coarse)]
        for model in models:
            PTQ4ViT(candidates=10, rounds=1, prefix=prefix)(model, batches()[1:])
        steps = [model.blocks[1].mlp.fc1.input_quant.step for model in models]
        assert torch.equal(*steps) == same


def test_few_rows_give_other_steps_but_not_much_worse_ones():
    full, few = tiny("vit"), tiny("vit")
    PTQ4ViT(candidates=25, rounds=1)(full, batches())
    PTQ4ViT(candidates=25, rounds=1, rows=34)(few, batches())
    steps = [torch.cat([quantizer.step.detach() for _, quantizer in quantizers(model)]) for model in (full, few)]
    assert not torch.equal(*steps)
    assert error(few) < 2 * error(full)


def test_options_that_leave_no_candidates_are_refused():
    with pytest.raises(QatError, match=r"alpha is 0.9: give less than beta, 0.5"):
        PTQ4ViT(alpha=0.9, beta=0.5)
    with pytest.raises(QatError, match="candidates"):
        PTQ4ViT(candidates=1)


def test_calibrated_sites_stay():
    model = tiny("vit")
    PTQ4ViT(candidates=25, rounds=1)(model, batches())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.blocks[1].mlp.fc1.input_quant.step.fill_(torch.nan)
    PTQ4ViT(candidates=25, rounds=1)(model, batches())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {"blocks.1.mlp.fc1.input_quant.step"}
    assert model.blocks[1].mlp.fc1.input_quant.calibrated
