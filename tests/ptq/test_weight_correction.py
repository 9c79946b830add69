"""Corrections of weights and biases on tiny models. Shapes: I inputs and O outputs of a layer, n rows."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.layer_work import LayerWork
from qat.ptq.steps import Steps
from qat.ptq.tensor_search import TensorSearch
from qat.ptq.unit_work import UnitWork
from qat.ptq.weight_correction import GPTQ, BiasCorrection, Ridge, fit_weight
from qat.quantizers import LSQ, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, switched_off, weights
from tests.ptq.test_output_search import batches, tiny
from tests.ptq.test_work import started

FINE = Rule("*.weight_quant", Uniform(8, granularity="channel"))
COARSE = (FINE, Rule("*.input_quant", Uniform(2)))
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def layers(here: UnitWork) -> list[LayerWork]:
    found = [here.layer(product) for product in here.products]
    return [layer for layer in found if layer is not None]


def reads(here: UnitWork, layer: LayerWork, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a layer reads and what it should read, both (n, I), with the sites before it quantized."""
    inputs, here.inputs = here.inputs, tensors
    seen = [x for visits in here.watched([layer.product.left], quantized=True) for x in visits[layer.product.left]]
    here.inputs = inputs
    quantized, exact = zip(*(layer._rows(x) for x in seen), strict=True)
    return torch.cat(quantized), torch.cat(exact)


def bias_of(layer: LayerWork) -> Tensor:
    return torch.zeros(()) if layer.layer.bias is None else layer.layer.bias.detach().clone()


@torch.no_grad()
def ridge_errors(here: UnitWork, step: Ridge) -> dict[str, tuple[float, float]]:
    """The error of every layer on images of which the step has seen none, before it and after it."""
    other = started(*COARSE, count=2, images=8, seed=5).inputs
    found = {}
    for layer in layers(here):
        q, x = reads(here, layer, other)
        target = x @ layer.weight.T + bias_of(layer)
        errors = []
        for change in (False, True):
            if change:
                step.product(here, layer.product)
            errors.append((q @ layer.weight.T + bias_of(layer) - target).square().mean().item())
        found[layer.name] = tuple(errors)
    return found


def test_ridge_serves_images_that_it_has_not_seen():
    """Each layer has less error, or is as it was."""
    here = started(*COARSE, count=4, images=8)
    errors = ridge_errors(here, Ridge())
    assert set(errors) == {f"blocks.1.{layer}" for layer in LAYERS}
    for name, (before, after) in errors.items():
        assert after <= before, name
    assert sum(after < 0.9 * before for before, after in errors.values()) >= 2


@torch.no_grad()
def test_ridge_leaves_a_layer_alone_where_halves_teach_each_other_nothing():
    """One image in each half, and more inputs than tokens."""
    here = started(*COARSE, count=1, images=2)
    before = {layer.name: layer.weight.clone() for layer in layers(here)}
    changed = []
    for layer in layers(here):
        Ridge().product(here, layer.product)
        changed.append(not torch.equal(layer.weight, before[layer.name]))
        assert layer.quantizer.calibrated
    assert not all(changed)


@torch.no_grad()
def test_ridge_does_no_harm_to_a_convolution_without_a_bias():
    here = started(FINE, Rule("patch_embed.proj.input_quant", Uniform(2)), count=4, images=8, unit=0)
    here.model.patch_embed.proj.bias = None
    (layer,) = layers(here)
    q, x = reads(here, layer, here.inputs)
    target, errors = x @ layer.weight.T, [(q @ layer.weight.T - x @ layer.weight.T).square().mean()]
    Ridge(damping=0.01).product(here, layer.product)
    errors.append((q @ layer.weight.T - target).square().mean())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("step", [Ridge(), Ridge(damping=0.1)], ids=repr)
def test_ridge_leaves_layers_with_float_inputs_alone(step):
    model = tiny("deit", FINE, Rule("blocks.0.mlp.fc2.input_quant", Uniform(2)))
    before = copy.deepcopy(model.state_dict())
    Steps([TensorSearch(), step])(model, batches(2, 8))
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    filled = {f"{name}.{kind}" for name, _ in quantizers(model) for kind in ("step", "zero_point")}
    assert changed - filled == {"blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias"}


@pytest.mark.parametrize("name", ["deit", "swin", "sret"])
@pytest.mark.parametrize("recipe", ["uniform", "vvtq"])
def test_gptq_leaves_weights_on_the_grid_of_their_quantizer(name, recipe):
    """Bit for bit, so that the model computes the same with its weight quantizers off."""
    model = tiny(name, *build_recipe(recipe, w_bits=3, a_bits=4))
    Steps([TensorSearch(), Ridge(), GPTQ()])(model, batches())
    layers = [site.name.removesuffix(".weight_quant") for site in weights(model)]
    rounded = [x for x in layers if model.get_submodule(x).products()[0].matrices is not None]
    assert len(layers) - len(rounded) == (4 if name == "sret" else 0), "convolutions that pad"
    with torch.no_grad():
        for layer in map(model.get_submodule, rounded):
            assert torch.equal(layer.weight_quant(layer.weight), layer.weight)
            assert layer.weight_quant.encode(layer.weight).unique().numel() > 1


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_gptq_has_less_error_than_the_nearest_values(alpha):
    here = started(*build_recipe("uniform", w_bits=2, a_bits=8), count=4, images=8, floats=True)
    here.remember()
    for layer in layers(here):
        q, _ = reads(here, layer, here.inputs)
        weight, nearest = layer.weight.clone(), layer.quantizer(layer.weight)
        GPTQ(damping=0.01, alpha=alpha).product(here, layer.product)
        rounded = layer.quantizer(layer.weight)
        assert (q @ (rounded - weight).T).square().mean() < 0.9 * (q @ (nearest - weight).T).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("spec", [Uniform(4, zero="fractional"), LSQ(4, signed=False, offset=True)], ids=repr)
def test_gptq_refuses_weights_without_evenly_spaced_whole_codes(spec):
    model = tiny("deit", FINE, Rule("blocks.1.mlp.fc1.weight_quant", spec))
    message = rf"GPTQ rounds to evenly spaced values, and 'blocks\.1\.mlp\.fc1\.weight_quant' has {type(spec).__name__}"
    with pytest.raises(QatError, match=message):
        GPTQ()(model, batches())


CORRECTED = [[BiasCorrection()], [Ridge(), GPTQ(), BiasCorrection()], [GPTQ(), BiasCorrection(affine=True)]]


@pytest.mark.parametrize("steps", CORRECTED, ids=["rounding", "corrected", "affine"])
@pytest.mark.parametrize("name", ["deit", "swin"])
@torch.no_grad()
def test_bias_correction_makes_the_mean_error_of_every_output_vanish(name, steps):
    """Over all calibration images, each layer with all that comes before it as it will be."""
    model, count = tiny(name, *build_recipe("uniform", w_bits=2, a_bits=3)), 4
    plain = copy.deepcopy(model)
    names = [site.name.removesuffix(".weight_quant") for site in weights(model)]

    def means(model: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {}
        sites = {name: model.get_submodule(name) for name in names}

        def keep(name: str, args: object, out: Tensor) -> None:
            seen.setdefault(name, []).append(out.flatten(2).mT if "patch_embed" in name else out)

        with watching(sites, after=keep):
            for x in batches(2, count):
                model(x)
        return {name: torch.cat([x.flatten(0, -2) for x in outs]).mean(0) for name, outs in seen.items()}

    with switched_off(quantizer for _, quantizer in quantizers(plain)):
        exact = means(plain)
    Steps([TensorSearch(), *steps])(model, batches(2, count))
    found = means(model)
    for name in names:
        assert (found[name] - exact[name]).abs().max() <= 1e-4 * exact[name].abs().max(), name  # float32 of many rows


@torch.no_grad()
def test_an_affine_correction_has_less_error_and_keeps_the_codes():
    errors, codes = [], []
    for affine in (False, True):
        here = started(*build_recipe("uniform", w_bits=2, a_bits=3), count=4, images=8, floats=True)
        here.remember()
        (layer, *_) = layers(here)
        weight, bias = layer.weight.clone(), bias_of(layer)
        exact = [x for v in here.float_watched([layer.product.left]) for x in v[layer.product.left]]
        target = torch.cat([layer._rows(x)[1] for x in exact]) @ weight.T + bias
        BiasCorrection(affine=affine, damping=0.0).product(here, layer.product)
        q, _ = reads(here, layer, here.inputs)
        errors.append((q @ layer.quantizer(layer.weight).T + bias_of(layer) - target).square().mean())
        codes.append(layer.quantizer.encode(layer.weight))
    assert errors[1] < errors[0]
    assert torch.equal(*codes)


def test_an_affine_correction_needs_steps_by_channel():
    model = tiny("deit", FINE, Rule("blocks.0.mlp.fc1.weight_quant", Uniform(4)))
    with pytest.raises(QatError, match=r"affine is true, but 'blocks\.0\.mlp\.fc1\.weight_quant' has Uniform\("):
        BiasCorrection(affine=True)(model, batches())


def test_bias_correction_goes_through_a_convolution_without_a_bias():
    model = tiny()
    model.patch_embed.proj.bias = None
    Steps([TensorSearch(), GPTQ(), BiasCorrection()])(model, batches())
    assert model.patch_embed.proj.bias is None
    assert model(batches()[0]).isfinite().all()


@pytest.mark.parametrize("step", [Ridge(), Ridge(damping=0.1), GPTQ()], ids=repr)
def test_an_error_names_the_layer(step):
    model = tiny()
    with torch.no_grad():
        model.blocks[0].norm2.bias[3] = torch.inf
    with pytest.raises(QatError, match=r"^layer 'blocks\.0\.mlp\.fc1': its inputs are not finite"):
        step(model, batches())


@torch.no_grad()
def test_the_range_of_a_corrected_weight_is_that_of_the_least_output_error():
    """An input that is always zero does not widen it."""
    here = started(Rule("*.mlp.fc1.weight_quant", Uniform(3, granularity="channel")), count=4, images=8)
    (layer,) = layers(here)
    layer.layer.weight[:, 5] = 50.0
    here.model.blocks[1].norm2.weight[5] = here.model.blocks[1].norm2.bias[5] = 0.0
    x, weight = layer.moments, layer.weight
    fit_weight(layer)
    assert layer.quantizer.step.max() < 1
    D = (layer.quantizer(weight) - weight).double()
    layer.quantizer.init_from(weight)
    full = (layer.quantizer(weight) - weight).double()
    assert ((D @ x.inputs_gram) * D).sum() < 0.1 * ((full @ x.inputs_gram) * full).sum()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ridge(damping=0.0), "Ridge: damping is 0"),
        (lambda: GPTQ(damping=-1.0), "GPTQ: damping is -1"),
        (lambda: GPTQ(alpha=1.5), "GPTQ: alpha is 1.5"),
        (lambda: BiasCorrection(damping=-1.0), "BiasCorrection: damping is -1"),
    ],
)
def test_an_option_out_of_range_is_refused(make, message):
    with pytest.raises(QatError, match=message):
        make()
