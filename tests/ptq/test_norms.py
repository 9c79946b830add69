"""Moving scales out of a LayerNorm: the worked example, and every link of every family."""

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.layers import QuantLayerNorm
from qat.ptq import Observe
from qat.ptq.norms import fold, unit_unchanged
from qat.quantizers import PTF, IntegerNorm
from qat.recipe import Rule, build_recipe
from qat.sites.family import Family, Unit, family_of
from qat.sites.insert import quantize
from tests.contracts.test_families import MODELS, float_model, images

every_model = pytest.mark.parametrize("name", MODELS)


def linked(name: str) -> tuple[nn.Module, list]:
    model = quantize(float_model(name), [])
    return model, family_of(model).norm_links(model)


@every_model
@torch.no_grad()
def test_a_link_names_what_a_norm_reads_and_the_only_one_that_reads_it(name):
    model, links = linked(name)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # input and output of every application

    def keep(key: str, before: object, after: Tensor) -> None:
        if isinstance(before, Tensor):
            seen.setdefault(key, []).append((before.flatten().sort().values, after.flatten().sort().values))

    for key, module in model.named_modules():
        if key:
            module.register_forward_hook(lambda _m, args, out, key=key: keep(key, args[0], out))
    model(images())
    for link in links:
        if link.source is not None:
            sources = [after for _, after in seen[link.source]]
            assert all(any(torch.equal(before, x) for x in sources) for before, _ in seen[link.norm]), link
        for reader in link.readers:
            for (_, after), (read, _) in zip(seen[link.norm], seen[reader], strict=True):
                assert torch.equal(read.unique(), after.unique()) or name == "swin_padded", link


@every_model
def test_no_norm_before_a_linear_layer_is_forgotten(name):
    _, links = linked(name)
    norms = [link.norm for link in links]
    assert len(set(norms)) == len(norms)
    expected = {"swin": 2 * 4 + 1, "swin_padded": 2 * 4 + 1, "sret": 3 * (2 + 2)}
    expected |= {"parallel_things": 2 * 4, "parallel_fused": 2 * 1}
    expected |= dict.fromkeys(("siglip", "perception"), 2 * 2 + 2)  # the last norm is read by the pool, which has one
    expected |= dict.fromkeys(("aimv2", "parallel_scaling", "grouped_queries"), 0)  # an RmsNorm has no bias to rewrite
    expected |= dict.fromkeys(("post_norm", "eva_post_norm"), 0)  # a sum reads their norms
    assert sum(link.linear is not None for link in links) == expected.get(name, 2 * 2)


def test_a_norm_of_sret_that_reads_two_sites_has_no_source():
    _, links = linked("sret")
    sources = {link.norm: link.source for link in links}
    assert sources["stages.1.blocks.1.norm1"] is None  # the MLP before the block, and the one between its applications
    assert sources["stages.1.blocks.1.norm2"] == "stages.1.blocks.1.attn_residual_quant"
    assert (
        sources["stages.1.mlps.2.norm1"] == sources["stages.1.mlps.3.norm1"] == "stages.1.blocks.1.mlp_residual_quant"
    )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "swin_padded"])
@torch.no_grad()
def test_any_ratio_and_shift_leave_the_function_as_it_is(name):
    model, links = linked(name)
    generator = torch.Generator().manual_seed(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images())
    with unit_unchanged(Unit("model", model), images(), []):
        for link in links:
            if link.linear is not None:
                C = model.get_submodule(link.linear).in_features
                ratio = torch.rand(C, generator=generator) + 0.5
                fold(model, link, ratio, torch.randn(C, generator=generator))
                after = model.state_dict()
                assert all(not torch.equal(after[f"{x}.weight"], before[f"{x}.weight"]) for x in link.readers)
    assert (model(images()) - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
def test_zeros_of_a_padded_window_are_found_and_reported():
    model, links = linked("swin_padded")
    link = next(link for link in links if link.norm == "layers.0.blocks.0.norm1")
    with pytest.raises(QatError, match="changed the float model"), unit_unchanged(Unit("model", model), images(), []):
        fold(model, link, torch.full((12,), 0.5), torch.ones(12))


def test_a_family_without_links_or_units_says_so():
    class Plain(Family):
        def check(self, model: nn.Module) -> None:
            pass

    with pytest.raises(QatError, match="Linear does not list its LayerNorms: choose another method or recipe"):
        Plain().norm_links(nn.Linear(1, 1))
    with pytest.raises(QatError, match="Linear is not a chain of units: choose another method of calibration"):
        Plain().units(nn.Linear(1, 1))


def test_an_integer_norm_without_a_single_source_is_refused_by_name():
    rules = [Rule("*_residual_quant", PTF(8)), Rule("*norm1.output_quant", IntegerNorm(8))]
    with pytest.raises(QatError, match=r"site 'stages.0.blocks.0.norm1.output_quant': IntegerNorm reads whole numbers"):
        quantize(float_model("sret"), rules)


@pytest.mark.parametrize("recipe", ["fq_vit_888", "fq_vit_884_released"])
@pytest.mark.parametrize("name", ["deit", "distilled", "clip", "siglip", "eva_post_norm", "swin", "swin_padded"])
@torch.no_grad()
def test_an_integer_norm_reads_whole_numbers_of_steps(name, recipe):
    model = quantize(float_model(name), build_recipe(recipe, w_bits=8, a_bits=8))
    Observe()(model, [images(4)])
    seen: dict[str, Tensor] = {}
    norms = {key: module for key, module in model.named_modules() if isinstance(module, QuantLayerNorm)}
    for key, norm in norms.items():
        assert norm.source
        norm.register_forward_hook(lambda m, args, _, key=key: seen.update({key: args[0] / m.source[0].step}))
    model(images())
    assert seen.keys() == norms.keys()
    for key, numbers in seen.items():
        torch.testing.assert_close(numbers, numbers.round(), atol=1e-3, rtol=0, msg=key)  # float32 of up to 2040


def test_half_precision_cannot_hold_the_integers():
    model = quantize(float_model("swin"), build_recipe("fq_vit_888", w_bits=8, a_bits=8))
    Observe()(model, [images(4)])
    with pytest.raises(QatError, match=r"trainer\.precision 32-true"), torch.autocast("cpu", torch.bfloat16):
        model(images())


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (None, "'blocks.0.attn_residual_quant' is not quantized"),
        ({"class_path": "LSQ", "init_args": {"bits": 8, "signed": False, "offset": True}}, r"is LSQ\("),
        ({"class_path": "Uniform", "init_args": {"bits": 8, "zero": "fractional"}}, r"is Uniform\("),
        ({"class_path": "Uniform", "init_args": {"bits": 8, "granularity": "channel"}}, r"is Uniform\("),
    ],
)
def test_an_integer_norm_refuses_what_is_no_whole_number_of_steps(spec, found):
    rules = [{"match": "blocks.0.attn_residual_quant", "spec": spec}]
    with pytest.raises(QatError, match=rf"'blocks.0.norm2.output_quant': IntegerNorm reads whole numbers.*{found}"):
        quantize(float_model("deit"), build_recipe("fq_vit_888", rules, w_bits=8, a_bits=8))


def test_a_unit_that_gives_zeros_is_unchanged_while_it_does():
    """A head that starts at zero."""
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    with torch.no_grad(), unit_unchanged(Unit("head", layer), torch.ones(1, 3), []):
        pass
    with torch.no_grad(), pytest.raises(QatError, match="a rewrite changed the float model: what head computes"):
        change(layer)


def change(layer: nn.Linear) -> None:
    with unit_unchanged(Unit("head", layer), torch.ones(1, 3), []):
        layer.bias.fill_(1e-3)
