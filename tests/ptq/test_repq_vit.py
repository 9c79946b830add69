"""RepQ-ViT: the worked example of its reparameterization, to the code, and what the method refuses."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.layers import QuantLayerNorm, QuantLinear
from qat.ptq import RepQViT
from qat.ptq.fold_norms import reparameterize
from qat.ptq.norms import fold
from qat.quantizers import Uniform, UniformQuantizer
from qat.quantizers.spec import Layout
from qat.recipe import Rule, build_recipe
from qat.sites.family import NormLink
from qat.sites.insert import SiteBuilder, quantize, quantizers
from tests.contracts.test_families import float_model, images

X = torch.tensor([[1.0, 2, 3, 6], [-2, 0, 4, 2], [0.5, -1.5, 2.5, -3.5]])
OUTPUT = torch.tensor([[4.4190448149, 2.9845224075], [4.2444271016, -0.2332813047], [4.2444271016, -1.1277084062]])
LINK = NormLink("0", None, "1")


def example(zero: str) -> tuple[nn.Sequential, UniformQuantizer]:
    """The LayerNorm and the layer of the example, and the quantizer with a step for each channel."""
    norm, linear = nn.LayerNorm(4, eps=1e-6), nn.Linear(4, 2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1, 0.5, 2, 0.25]))
        norm.bias.copy_(torch.tensor([0, 0.25, -0.5, 1]))
        linear.weight.copy_(torch.tensor([[1, -2, 0.5, 4], [0, 1, -1, 2]]))
        linear.bias.copy_(torch.tensor([0.1, -0.3]))
    site = SiteBuilder([Rule("1.input_quant", Uniform(4, zero=zero))])
    model = nn.Sequential(QuantLayerNorm(norm, site.child("0")), QuantLinear(linear, site.child("1")))
    channels = Uniform(4, granularity="channel").build(Layout(-1, 4, batched=True))
    with torch.no_grad():
        channels.step.copy_(torch.tensor([0.25, 0.125, 0.5, 0.125]))
        channels.zero_point.copy_(torch.tensor([8.0, 6, 7, 4]))
    return model, channels


def apply(model: nn.Sequential, x: Tensor, quantized: bool) -> Tensor:
    model[1].input_quant.enabled = quantized
    return model(x)


@torch.no_grad()
def test_an_integer_zero_point_keeps_every_code():
    model, channels = example("integer")
    codes = channels.encode(model[0](X))
    before = nn.functional.linear(channels(model[0](X)), model[1].weight, model[1].bias)
    reparameterize(model, LINK, channels)
    site = model[1].input_quant
    assert (float(site.step), float(site.zero_point)) == (0.25, 6.0)
    assert model[0].weight.tolist() == [1, 1, 1, 0.5]
    assert model[0].bias.tolist() == [0.5, 0.5, 0, 1.5]
    assert model[1].weight.tolist() == [[1, -1, 1, 2], [0, 0.5, -2, 1]]
    assert model[1].bias.tolist() == pytest.approx([0.35, 0.7])
    assert codes.tolist() == [[4, 6, 6, 15], [3, 6, 11, 13], [10, 6, 11, 9]]
    assert torch.equal(site.encode(model[0](X)), codes)
    expected = torch.tensor([[4.35, 2.95], [4.35, -0.05], [4.10, -1.05]])
    torch.testing.assert_close(apply(model, X, True), expected, atol=1e-6, rtol=0)  # float32 sums of four products
    torch.testing.assert_close(before, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(apply(model, X, False), OUTPUT, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_released_mean_is_a_fraction_and_adds_a_level():
    model, channels = example("fractional")
    reparameterize(model, LINK, channels)
    site = model[1].input_quant
    assert float(site.zero_point) == 6.25
    assert model[0].bias.tolist() == [0.4375, 0.4375, -0.0625, 1.4375]
    assert model[1].bias.tolist() == pytest.approx([0.5375, 0.66875])
    codes = site(model[0](X)) / site.step + site.zero_point
    assert codes.tolist() == [[3.25, 6.25, 6.25, 15], [2.25, 6.25, 11.25, 13.25], [10.25, 6.25, 11.25, 9.25]]
    expected = torch.tensor([[4.1625, 2.85625], [4.2875, -0.08125], [4.2875, -1.08125]])
    torch.testing.assert_close(apply(model, X, True), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(apply(model, X, False), OUTPUT, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("zero", "levels"), [(6.25, 17), (6.5, 17), (7.0, 16)])
@torch.no_grad()
def test_levels_of_a_zero_point(zero, levels):
    site = Uniform(4, zero="fractional").build(Layout(0, 1, batched=True))
    site.step.fill_(1.0)
    site.zero_point.fill_(zero)
    assert site(torch.linspace(-100, 100, 4001)).unique().numel() == levels


@pytest.mark.parametrize("name", ["deit", "swin"])
@torch.no_grad()
def test_a_whole_model_computes_what_steps_per_channel_compute(name, monkeypatch):
    rules = [rule for rule in build_recipe("repq_vit", w_bits=8, a_bits=4) if "weight" not in rule.match]
    model, kept = quantize(float_model(name), rules), {}

    def keep(model: nn.Module, link: NormLink, channels: UniformQuantizer, strength: float) -> None:
        kept[link.linear] = copy.deepcopy(channels)
        reparameterize(model, link, channels, strength)

    monkeypatch.setattr("qat.ptq.fold_norms.reparameterize", keep)
    RepQViT()(model, [images(8)])
    unfolded = quantize(float_model(name), rules)
    unfolded.load_state_dict(model.state_dict() | quantize(float_model(name), []).state_dict())
    for linear, channels in kept.items():
        unfolded.get_submodule(linear).input_quant = channels
    # a code next to a boundary may fall on the other side after rounding in float32
    torch.testing.assert_close(model(images()), unfolded(images()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rule", [None, {"class_path": "LSQ", "init_args": {"bits": 4}}])
def test_a_recipe_without_zero_points_is_refused_by_name(rule):
    rules = build_recipe("repq_vit", [{"match": "blocks.1.mlp.fc1.input_quant", "spec": rule}], w_bits=4, a_bits=4)
    with pytest.raises(QatError, match=r"FoldNorms needs Uniform.*'blocks.1.mlp.fc1.input_quant'"):
        RepQViT()(quantize(float_model("deit"), rules), [images()])


@pytest.mark.parametrize("weight", [0.0, 1e-6, 1e-5])
def test_dead_channels_are_guarded(weight):
    model = float_model("deit")
    with torch.no_grad():
        model.blocks[0].norm1.weight[:3] = weight
        model.blocks[0].norm1.bias[:3] = torch.tensor([0.0, 0.5, -0.5])
    quantize(model, build_recipe("repq_vit", w_bits=4, a_bits=4))
    RepQViT()(model, [images(4)])
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))
    assert model(images()).isfinite().all()
    assert abs(float(model.blocks[0].attn.qkv.input_quant.zero_point)) < 16


def test_windows_that_are_padded_are_refused_before_any_work():
    model = quantize(float_model("swin_padded"), build_recipe("repq_vit", w_bits=4, a_bits=4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(QatError, match=r"changed the float model: what layers\.0\.blocks\.0 computes"):
        RepQViT()(model, [images(4)])
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) or value.isnan().all() for key, value in before.items())


@pytest.mark.parametrize("folds", [0, 2])
def test_an_interrupt_between_folds_leaves_the_model_as_it_was(folds, monkeypatch):
    """Otherwise some norms would be folded, and the float model would be another one."""
    model, done = quantize(float_model("deit"), build_recipe("repq_vit", w_bits=4, a_bits=4)), []
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fold_some(*args: object, **options: object) -> None:
        if len(done) == folds:
            raise KeyboardInterrupt
        done.append(fold(*args, **options))

    monkeypatch.setattr("qat.ptq.fold_norms.fold", fold_some)
    with pytest.raises(KeyboardInterrupt):
        RepQViT()(model, [images(4)])
    after = model.state_dict()
    assert all(
        torch.equal(value, after[key]) or (value.isnan().all() and after[key].isnan().all())
        for key, value in before.items()
    )


@pytest.mark.parametrize("shares", [[], [2.0], [0.3]])
def test_shares_that_are_no_upper_ends_are_refused(shares):
    with pytest.raises(QatError, match=r"above 0.5 and at most 1"):
        RepQViT(shares)
