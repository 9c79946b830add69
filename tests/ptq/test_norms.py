"""Moving scales out of a LayerNorm: the worked example, and every link of every family."""

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.layers import QuantLayerNorm
from qat.ptq import Observe
from qat.ptq.norms import fold, same_function
from qat.recipe import build_recipe
from qat.sites.family import family_of
from qat.sites.insert import quantize
from tests.contracts.test_families import MODELS, float_model, images

LINKED = [name for name in MODELS if name != "sret"]
every_linked = pytest.mark.parametrize("name", LINKED)


def linked(name: str) -> tuple[nn.Module, list]:
    model = quantize(float_model(name), [])
    return model, family_of(model).norm_links(model)


@every_linked
@torch.no_grad()
def test_a_link_names_what_a_norm_reads_and_the_only_one_that_reads_it(name):
    model, links = linked(name)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(model.named_modules())

    def keep(key: str, before: Tensor, after: Tensor) -> None:
        seen.setdefault(key, (before.clone(), after.clone()))

    for key, module in modules.items():
        if key:
            module.register_forward_hook(lambda _m, args, out, key=key: keep(key, args[0], out))
    model(images())
    for link in links:
        before, after = seen[link.norm]
        if link.source is not None:
            source = seen[link.source][1]
            assert torch.equal(source.flatten().sort().values, before.flatten().sort().values), link
        if link.linear is not None:
            read = seen[link.linear][0]
            assert torch.equal(read.flatten().unique(), after.flatten().unique()) or name == "swin_padded", link


@every_linked
def test_no_norm_before_a_linear_layer_is_forgotten(name):
    _, links = linked(name)
    norms = [link.norm for link in links]
    assert len(set(norms)) == len(norms)
    blocks = 4 if name.startswith("swin") else 2
    assert sum(link.linear is not None for link in links) == 2 * blocks + name.startswith("swin")


@pytest.mark.parametrize("name", [name for name in LINKED if name != "swin_padded"])
@torch.no_grad()
def test_any_ratio_and_shift_leave_the_function_as_it_is(name):
    model, links = linked(name)
    generator = torch.Generator().manual_seed(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images())
    with same_function(model, images()):
        for link in links:
            if link.linear is not None:
                C = model.get_submodule(link.linear).in_features
                ratio = torch.rand(C, generator=generator) + 0.5
                fold(model, link, ratio, torch.randn(C, generator=generator))
                assert not torch.equal(model.state_dict()[f"{link.linear}.weight"], before[f"{link.linear}.weight"])
    assert (model(images()) - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
def test_zeros_of_a_padded_window_are_seen_and_said():
    model, links = linked("swin_padded")
    link = next(link for link in links if link.norm == "layers.0.blocks.0.norm1")
    with pytest.raises(QatError, match="changed the float model"), same_function(model, images()):
        fold(model, link, torch.full((12,), 0.5), torch.ones(12))


def test_a_family_without_links_says_so():
    model = quantize(float_model("sret"), [])
    with pytest.raises(QatError, match="does not list its LayerNorms"):
        family_of(model).norm_links(model)


@pytest.mark.parametrize("recipe", ["fq_vit_888", "fq_vit_884_released"])
@pytest.mark.parametrize("name", ["deit", "distilled", "swin", "swin_padded"])
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


@pytest.mark.parametrize("name", LINKED)
@torch.no_grad()
def test_the_units_in_a_row_are_the_model(name):
    model, _ = linked(name)
    x = images()
    for unit in family_of(model).units(model):
        x = unit.run(x)
    assert torch.equal(x, model(images()))
