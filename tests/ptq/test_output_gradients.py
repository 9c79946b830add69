"""Gradients inside one unit, against autograd with plain code, on tiny models."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import build_float
from qat.ptq.full_range import FullRange
from qat.ptq.output_gradients import Gradients, output_gradients
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Steps
from qat.ptq.unit_work import UnitWork
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers, switched_off

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@dataclass
class Probe(Step):
    """Keeps the gradients of one unit."""

    needs_logits = True
    unit_name: str = "blocks.0"
    found: list[Gradients] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    stage = Stage.SEARCH

    def unit(self, here: UnitWork) -> None:
        if not self.targets:
            self.targets = here.work.logits
        if here.unit.name == self.unit_name:
            pairs = zip(here.inputs, self.targets, strict=True)
            self.found = [output_gradients(here, x, target) for x, target in pairs]


def tiny(*rules: Rule) -> nn.Module:
    torch.manual_seed(0)
    model = build_float("deit_tiny_patch16_224", None, 10, TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return quantize(model, [*build_recipe("uniform", w_bits=3, a_bits=3), *rules])


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def probed(model: nn.Module, x: list[Tensor], unit: str = "blocks.0") -> Probe:
    probe = Probe(unit)
    Steps([FullRange(), probe], prefix="float")(model, x)
    return probe


def reference(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients in the first block, quantized alone, of KL from the float model, by names of modules."""
    with switched_off(q for _, q in quantizers(model)), torch.no_grad():
        target = model(x).softmax(-1)
    block, kept = model.blocks[0], {}

    def keep(name):
        def hook(_, args):
            kept[name] = args[0]
            args[0].retain_grad()

        return hook

    attn, mlp = block.attn, block.mlp
    places = {"qkv": attn.qkv.output_quant, "scores": attn.scores_quant, "proj": attn.proj.input_quant,
              "fc1": mlp.fc1.output_quant, "fc2": mlp.fc2.output_quant}  # fmt: skip
    hooks = [place.register_forward_pre_hook(keep(name)) for name, place in places.items()]
    others = [q for name, q in quantizers(model) if not name.startswith("blocks.0.")]
    with switched_off(others):
        probs = model(x).log_softmax(-1)
    F.kl_div(probs, target, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: tensor.grad for name, tensor in kept.items()}


def test_gradients_are_those_of_autograd():
    """The target of the loss is rounded in another way: p against the exponential of its logarithm."""
    model, x = tiny(), images(12)  # more than one slice
    found = probed(model, [x]).found[0]
    expected = reference(copy.deepcopy(model), x)
    products = {name.removeprefix("blocks.0."): visits for name, visits in found.products.items()}
    assert all(len(visits) == 1 for visits in products.values())
    heads = expected["proj"].unflatten(2, (3, -1)).transpose(1, 2)  # (B, H, N, D): proj reads all heads side by side
    for name, gradient in {
        "attn.qkv.input_quant": expected["qkv"], "attn.q_quant": expected["scores"], "attn.probs_quant": heads,
        "mlp.fc1.input_quant": expected["fc1"], "mlp.fc2.input_quant": expected["fc2"],
    }.items():  # fmt: skip
        torch.testing.assert_close(products[name][0], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    assert found.unit.shape == (12, 17, 24)
    assert found.logits.shape == (12, 10)


def test_a_convolution_gives_places_before_channels():
    found = probed(tiny(), [images(2), images(3)], "embedding").found
    assert [g.products["patch_embed.proj.input_quant"][0].shape for g in found] == [(2, 16, 24), (3, 16, 24)]


def test_nothing_is_left_behind():
    model = tiny()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: value.clone() for name, value in model.named_parameters() if not name.endswith("step")}
    probed(model, [images(2)])
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["head.weight"]
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert not {"_scores", "_mix"} & set(vars(model.blocks[0].attn))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_gradient_of_zero_is_refused():
    model = tiny()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(QatError, match=r"'blocks.0' quantized, is zero or rounding noise"):
        probed(model, [images(2)])


def test_one_product_without_gradient_is_refused():
    model = tiny()
    nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    with pytest.raises(QatError, match=r"at the output of 'blocks.0.mlp.fc1.input_quant' is zero"):
        probed(model, [images(2)])


def test_fused_attention_is_refused():
    model = tiny(Rule("*.attn.probs_quant"))
    with pytest.raises(QatError, match="fused attention: quantize the probabilities"):
        probed(model, [images(2)])
