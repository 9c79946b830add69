"""Calibration by the error of matrix products, on tiny models."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import qat
from qat.errors import QatError
from qat.models import build_float
from qat.models.vit import ViTFamily
from qat.ptq import InitSteps, OutputSearch
from qat.ptq.matrix_products import matrix_products
from qat.ptq.output_search import samples, samples_of_counts
from qat.ptq.product_search import ProductSearch
from qat.quantizers import LSQ, LogIntSoftmaxQuantizer, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.family import Family
from qat.sites.insert import quantize, quantizers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 4)}
TINY_SRET = {"img_size": 32, "embed_dims": (12, 24), "depths": (1, 2), "num_heads": (2, 4), "groups": ((4, 2), (2, 1))}
MODELS = {
    "deit": ("deit_tiny_patch16_224", TINY),
    "swin": ("swin_tiny_patch4_window7_224", TINY_SWIN),
    "sret": ("sret_tiny", TINY_SRET),
}
FEWSHOT = Path(qat.__file__).parents[1] / "configs/deit_t_fewshot_lsq.yaml"
FEWSHOT_RULES = yaml.safe_load(FEWSHOT.read_text(encoding="utf-8"))["model"]["rules"]
PRODUCTS = {"deit": 1 + 2 * 6 + 1, "swin": 1 + 3 * 6 + 1 + 1, "sret": 3 * (6 + 2 * 2) + 1}  # convolutions of SReT pad
RECIPES = [
    ("deit", "uniform"), ("deit", "vvtq"), ("deit", "bitlog2_half_16"), ("deit", "fq_vit_884"), ("swin", "uniform"),
    ("swin", "vvtq"), ("swin", "repq_vit"), ("swin", "fq_vit_884"), ("sret", "uniform"), ("sret", "vvtq"),
]  # fmt: skip


def tiny(name: str = "deit", *rules: Rule) -> nn.Module:
    arch, arguments = MODELS[name]
    torch.manual_seed(0)
    model = build_float(arch, None, 10, arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return quantize(model, rules or build_recipe("uniform", w_bits=4, a_bits=4))


def batches(count: int = 2, images: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, 32, 32, generator=generator) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The error of every product, before and after its search."""
    seen: list[tuple[float, float]] = []
    search = ProductSearch.search_

    def spy(product: ProductSearch, rounds: int) -> None:
        before = product.error()
        search(product, rounds)
        seen.append((before, product.error()))

    monkeypatch.setattr(ProductSearch, "search_", spy)
    return seen


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_every_site_is_filled_and_no_product_gets_worse(name, recipe, errors):
    model = tiny(name, *build_recipe(recipe, w_bits=4, a_bits=8))
    OutputSearch(rounds=1)(model, batches())
    assert all(quantizer.calibrated and quantizer.enabled for _, quantizer in quantizers(model))
    softmaxes = sum(isinstance(quantizer, LogIntSoftmaxQuantizer) for _, quantizer in quantizers(model))
    assert len(errors) == PRODUCTS[name] - 2 * softmaxes, "FQ-ViT quantizes no operand of attention, but its softmax"
    assert all(after <= before for before, after in errors)
    assert sum(after < before for before, after in errors) > len(errors) / 2
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.isfinite(model(batches()[0])).all()


def test_the_recipe_of_the_fewshot_config_is_filled(errors):
    model = tiny("deit", *build_recipe("vvtq", FEWSHOT_RULES, w_bits=3, a_bits=3))
    OutputSearch()(model, batches())
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))
    groups = {name.removeprefix("blocks.0."): q.layout.groups for name, q in quantizers(model)}
    assert groups["attn.qkv.weight_quant"] == 72
    assert groups["attn.q_quant"] == groups["attn.proj.input_quant"] == 3
    assert all(after <= before for before, after in errors)


def test_the_model_comes_closer_to_the_float_model():
    images, found = batches(1, 16)[0], {}
    for method in (InitSteps(), OutputSearch()):
        model = tiny("deit", *build_recipe("uniform", w_bits=3, a_bits=3))
        for _, quantizer in quantizers(model):
            quantizer.enabled = False
        exact = model(images)
        for _, quantizer in quantizers(model):
            quantizer.enabled = True
        method(model, [images])
        found[type(method)] = (model(images) - exact).square().mean().item()
    assert found[OutputSearch] < 0.7 * found[InitSteps]


def test_a_unit_sees_what_the_quantized_units_before_it_make():
    coarse, fine = ({"match": "blocks.0.mlp.fc2.weight_quant", "spec": Uniform(bits).to_dict()} for bits in (2, 8))
    found = []
    for rule in (coarse, fine):
        model = tiny("deit", *build_recipe("uniform", [rule], w_bits=4, a_bits=4))
        OutputSearch(rounds=1)(model, batches())
        found.append({name: q.step.detach() for name, q in quantizers(model) if name.endswith("input_quant")})
    same = [name for name in found[0] if torch.equal(found[0][name], found[1][name])]
    assert [name for name in same if name.startswith("blocks.0.attn")]
    assert not [name for name in same if name.startswith(("blocks.1", "head"))]


def test_only_quantizers_change_and_the_result_loads():
    model, fresh = tiny(), tiny()
    before = state(model)
    OutputSearch(rounds=1)(model, batches())
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.{key}" for name, q in quantizers(model) for key in q.state_dict()}
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches()[0]), model(batches()[0]))


def test_the_same_images_give_the_same_values_and_the_rows_matter():
    def run(rows: int) -> dict[str, Tensor]:
        model = tiny()
        OutputSearch(rounds=1, rows=rows)(model, batches())
        return state(model)

    first, second, other = run(8), run(8), run(12)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_product_is_compared_on_as_many_rows_as_wanted(monkeypatch):
    """On all images where a sample gives a single row; otherwise on as many samples as give enough rows."""
    seen, search = [], ProductSearch.search_

    def spy(product: ProductSearch, rounds: int) -> None:
        seen.append(sum(len(x.flatten(0, -2)) for x in product.left.matrices()))
        search(product, rounds)

    monkeypatch.setattr(ProductSearch, "search_", spy)
    OutputSearch(rounds=1, rows=16)(tiny(), batches(2, 4))
    patches, heads = 2 * 16, 2 * 3 * 17  # of one image each: 16 patches; 17 rows of three heads
    assert seen == [patches, *(2 * [16, heads, heads, 16, 16, 16]), 8]  # the head reads one row of each of 8 images


@pytest.mark.parametrize("rows", [8, 9, 10])  # also where the images do not share them evenly
def test_the_class_token_of_every_image_is_among_the_rows(rows):
    model = tiny()
    product = next(p for p in matrix_products(model) if p.left == "blocks.0.attn.qkv.input_quant")
    x = torch.arange(4.0 * 17).reshape(4, 17, 1)
    found = samples(product, x, rows).flatten().tolist()
    assert len(set(found)) == len(found) >= rows
    assert {0.0, 17.0, 34.0, 51.0} <= set(found)


@pytest.mark.parametrize("rows", [6, 40, 1000])
def test_counts_are_those_of_the_rows(rows):
    products = {product.left: product for product in matrix_products(tiny())}
    images, qkv, head = (products[f"{x}.input_quant"] for x in ("patch_embed.proj", "blocks.0.attn.qkv", "head"))
    numbers = torch.arange(4.0 * 16).reshape(4, 16)  # of the rows; a patch has the number of its row everywhere
    square = numbers.reshape(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    cases = [(images, square, numbers), (qkv, numbers[..., None], numbers), (head, numbers[:, :1], numbers[:, :1])]
    for product, x, counts in cases:
        read = product.matrices.left(samples(product, x, rows))
        assert read[:, :1].tolist() == samples_of_counts(product, counts, x, rows).tolist()


def test_flags_and_hooks_are_put_back_when_it_is_interrupted():
    def interrupted():
        yield batches()[0]
        raise KeyboardInterrupt

    model = tiny().train()
    model.head.input_quant.enabled = False
    model.head.weight.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        OutputSearch()(model, interrupted())
    OutputSearch(rounds=1)(model, batches())
    assert [name for name, quantizer in quantizers(model) if not quantizer.enabled] == ["head.input_quant"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_put_back_when_a_forward_fails():
    model = tiny()
    model.blocks[1].mlp.fc2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        OutputSearch()(model, batches())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(quantizer.enabled for _, quantizer in quantizers(model))


def test_sites_that_are_calibrated_are_left_alone():
    model = tiny()
    InitSteps()(model, batches())
    before = state(model)
    OutputSearch()(model, [])  # nothing is left to do, so no image is needed
    with torch.no_grad():
        model.head.input_quant.step.fill_(torch.nan)
    OutputSearch()(model, batches())
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed <= {"head.input_quant.step", "head.input_quant.zero_point"}
    assert model.head.input_quant.calibrated


def test_a_range_that_the_output_needs_is_not_the_range_of_the_tensor():
    """The input of the head has a far channel that the head does not read."""
    model = tiny("deit", Rule("head.*_quant", LSQ(3, init="percentile", percentile=100)))
    with torch.no_grad():
        model.norm.bias[0] = 100.0
        model.head.weight[:, 0] = 0.0
    plain = copy.deepcopy(model)
    InitSteps()(plain, batches())
    OutputSearch()(model, batches())
    assert plain.head.input_quant.step.item() > 30
    assert model.head.input_quant.step.item() < 3


def test_a_site_of_no_product_gets_its_own_init():
    spec = LSQ(8, init="percentile", percentile=100)
    rules = [Rule("*residual_quant", spec), Rule("*.fc1.output_quant", spec), Rule("*.scores_quant", spec)]
    model, plain = tiny("deit", *rules), tiny("deit", *rules)
    OutputSearch()(model, batches())
    InitSteps()(plain, batches())
    first = {name: value for name, value in plain.state_dict().items() if name.startswith("blocks.0.")}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in first.items())


def test_values_without_quantized_probabilities_get_their_own_init():
    model = tiny("deit", Rule("*.attn.v_quant", Uniform(4, granularity="head")))  # fused attention hides the operands
    OutputSearch()(model, batches())
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))


def test_a_site_that_no_image_reaches_is_named():
    with pytest.raises(QatError, match=r"no calibration image reached 'patch_embed.proj.input_quant'"):
        OutputSearch()(tiny(), [])


def test_a_model_that_is_no_chain_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(ViTFamily, "units", Family.units)
    model = tiny()
    with pytest.raises(QatError, match="VisionTransformer is not a chain of units"):
        OutputSearch()(model, batches())
    assert not any(quantizer.calibrated for _, quantizer in quantizers(model))


def test_matrices_of_two_sizes_are_searched_together():
    """The applications of a block of SReT attend in groups of different size."""
    model = tiny("sret")
    sizes, search = [], ProductSearch.search_

    def spy(product: ProductSearch, rounds: int) -> None:
        sizes.append({x.shape[-2] for x in product.left.tensors if x.ndim == 4})
        search(product, rounds)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ProductSearch, "search_", spy)
        OutputSearch(rounds=1, levels=1)(model, batches())
    assert [tokens for tokens in sizes if tokens] == [{4, 8}] * 2 + [
        {2, 4}
    ] * 4  # q with k, and the probabilities with v


def test_a_tensor_that_is_not_finite_is_named():
    model = tiny()
    with torch.no_grad():
        model.blocks[0].norm1.bias.fill_(torch.nan)
    with pytest.raises(QatError, match=r"'blocks.0.attn.qkv.input_quant'.*not finite"):
        OutputSearch()(model, batches())


@pytest.mark.parametrize("option", ["rounds", "rows"])
def test_an_option_below_one_is_refused(option):
    with pytest.raises(QatError, match=f"OutputSearch: {option} is 0: give an integer from 1 to"):
        OutputSearch(**{option: 0})
