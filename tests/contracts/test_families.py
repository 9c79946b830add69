"""What every quantized model family promises, on tiny models. Shapes: B images, N tokens, C channels."""

import copy
import io
import pickle
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qat.models  # noqa: F401  registers the families
from qat.checkpoint.packed import packed_state, unpacked_state
from qat.models import build_float
from qat.ptq import InitSteps
from qat.quantizers import LSQ
from qat.recipe import Rule, build_recipe
from qat.sites.family import FAMILIES, family_of
from qat.sites.hooks import watching
from qat.sites.insert import quantize, quantizers, switched_off
from tests.contracts.family_cases import BLOCKS, MODELS, PRODUCTS, TWICE, VIT_PRODUCTS

FLOAT_PROBS = {"match": "*.attn.probs_quant", "spec": None}
every_model = pytest.mark.parametrize("name", MODELS)
every_block = pytest.mark.parametrize("name", BLOCKS)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@cache
def _float_model(name: str) -> nn.Module:
    arch, arguments = MODELS[name]
    torch.manual_seed(0)
    model = build_float(arch, None, 10, arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm's own start hides mistakes: biases are zero and norms are one
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def float_model(name: str) -> nn.Module:
    return copy.deepcopy(_float_model(name))


def recipe(*appended: dict[str, Any]) -> list[Rule]:
    """VVTQ at 4 bits, with steps that are quick to fit: none of these tests is about good ones."""
    rules = build_recipe("vvtq", appended, w_bits=4, a_bits=4)
    return [rule if rule.spec is None else replace(rule, spec=replace(rule.spec, init="percentile")) for rule in rules]


@cache
def _calibrated(name: str) -> nn.Module:
    model = quantize(float_model(name), recipe())
    InitSteps()(model, [images(4)])
    return model


def calibrated(name: str) -> nn.Module:
    return copy.deepcopy(_calibrated(name))


def off(model: nn.Module) -> Any:
    return switched_off([quantizer for _, quantizer in quantizers(model)])


def test_every_family_has_a_model():
    shown = {type(_float_model(name)) for name in MODELS}
    missing = [root.__name__ for root in FAMILIES if root not in shown]
    assert not missing, f"add a tiny model of {missing} to MODELS in family_cases.py"


@every_model
@torch.no_grad()
def test_switched_off_the_model_is_the_float_model(name):
    model = float_model(name)
    expected = model(images())
    quantize(model, recipe())
    with off(model):  # the scores are written out, so sums run in another order than in fused attention
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-5)


@every_model
@torch.no_grad()
def test_without_quantized_probabilities_it_is_the_float_model_exactly(name):
    model = float_model(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # where timm does not by itself
    expected = model(images())
    quantize(model, recipe(FLOAT_PROBS))
    with off(model):
        assert torch.equal(model(images()), expected)


@every_model
@torch.no_grad()
def test_four_bits_change_the_output(name):
    assert not torch.allclose(calibrated(name)(images()), float_model(name)(images()), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "cut"),
    [*((name, "tensor") for name in MODELS), *((name, "finer") for name in ("deit", "inner_norms", "swin", "sret"))],
)
@torch.no_grad()
def test_wide_codes_give_the_float_model_at_every_granularity(name, cut):
    wide = LSQ(16, init="percentile", percentile=100)
    rules = [Rule("*", wide)]
    if cut == "finer":
        channel, head, qkv = (replace(wide, granularity=kind) for kind in ("channel", "head", "qkv"))
        rules += [Rule("*_quant", channel), Rule("*.attn.[qkvsp]*_quant", head), Rule("*.qkv.weight_quant", qkv)]
        rules += [Rule("*.attn.*.*put_quant", channel)]  # only the projection knows heads at its input
    model = quantize(float_model(name), rules)
    InitSteps()(model, [images()] * 5)  # values are drawn with replacement, so look often
    for _, quantizer in quantizers(model):
        quantizer.step.mul_(4)  # a value that was never drawn is not clipped either
    torch.testing.assert_close(model(images()), float_model(name)(images()), atol=0.02, rtol=0.02)


@every_model
def test_names_are_kept_and_parameters_are_shared(name):
    model = float_model(name)
    names, before = set(model.state_dict()), dict(model.named_parameters())
    quantize(model, recipe())
    after = dict(model.named_parameters())
    assert all(after[key] is value for key, value in before.items())
    added = set(model.state_dict()) - names
    assert names <= set(model.state_dict())
    born = {key for key in added if key.endswith(".bias")}  # of layers that have none, for calibration
    assert all(key.endswith(("_quant.step", "_quant.offset")) for key in added - born)
    assert all(not model.state_dict()[key].any() and key not in after for key in born)


class Products(TorchDispatchMode):
    """Keeps the operands of every matrix product and convolution, as the device computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "convolution"):
            self.operands += [(name, args[0]), (name, args[1])]
        elif name in ("addmm", "baddbmm"):
            self.operands += [(name, args[1]), (name, args[2])]
        assert "attention" not in name, "fused attention hides its operands"
        return func(*args, **(kwargs or {}))


@every_model
@torch.no_grad()
def test_every_operand_of_every_product_has_a_site(name):
    model = quantize(float_model(name), [Rule("*", LSQ(2, init="lsq"))])
    InitSteps()(model, [images(4)])
    with Products() as products:
        model(images())
    with Products() as angles:  # of rotary positions: some versions of timm write their table as a product
        if rope := getattr(model, "rope", None):
            rope.get_embed(shape=[4, 4])
    table = {operand.shape for _, operand in angles.operands}
    found = [(operation, operand) for operation, operand in products.operands if operand.shape not in table]
    assert len(found) == 2 * PRODUCTS.get(name, VIT_PRODUCTS)
    for operation, operand in found:
        assert operand.unique().numel() <= 4, operation


@every_block
def test_a_block_is_one_graph_with_its_backward_and_gives_the_same_gradients(name):
    torch._dynamo.reset()  # fullgraph=True raises at a graph break
    block, shape, grads = calibrated(name).get_submodule(BLOCKS[name][0]), BLOCKS[name][1], []
    for forward in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        forward(x).square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in block.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))  # sums in another order


@every_model
def test_the_training_flag_is_kept(name):
    for training in (True, False):
        model = float_model(name).train(training)
        parts = ("blocks", "layers", "stages")  # in a family of stages, a whole stage
        part = next(f"{part}.1" for part in parts if hasattr(model, part))
        model.get_submodule(part).train(not training)
        quantize(model, recipe())
        for key, module in model.named_modules():
            assert module.training == (training != key.startswith(part)), key


@every_model
@torch.no_grad()
def test_copies_and_pickles_compute_the_same(name):
    model = calibrated(name)
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)


@every_model
@torch.no_grad()
def test_saved_or_packed_and_strictly_loaded_it_gives_the_same_logits(name):
    model = calibrated(name)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    arch, arguments = MODELS[name]
    fresh = quantize(build_float(arch, None, 10, arguments).eval(), recipe())
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(images()), model(images()))
    tensors, packed = packed_state(model)
    fresh.load_state_dict(unpacked_state(fresh, packed, tensors, name), strict=True)
    assert torch.equal(fresh(images()), model(images()))


@every_model
def test_every_parameter_gets_a_gradient(name):
    model = calibrated(name)  # in evaluation mode: stochastic depth may drop a whole branch
    model(images()).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@every_model
@torch.no_grad()
def test_every_quantizer_is_visited_once_in_a_forward_or_twice_where_its_block_is(name):
    model, visits = calibrated(name), Counter()
    for key, quantizer in quantizers(model):
        quantizer.register_forward_hook(lambda *_, key=key: visits.update([key]))
    model(images())
    assert visits == {key: 2 if fnmatch(key, TWICE.get(name, "")) else 1 for key, _ in quantizers(model)}


@every_model
@torch.no_grad()
def test_the_units_in_turn_are_the_model_and_have_every_parameter_once(name):
    model = calibrated(name)
    units, x = family_of(model).units(model), images()
    owners: dict[str, list[str]] = {key: [] for key, _ in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for unit in units:
        x = unit.run(x)
        for key, parameter in unit.named_parameters(model):
            assert parameter is parameters[key]
            owners[key].append(unit.name)
    assert torch.equal(x, model(images()))
    assert len({unit.name for unit in units}) == len(units)
    assert {key: owner for key, owner in owners.items() if len(owner) != 1} == {}


@every_model
@torch.no_grad()
def test_a_unit_reaches_the_sites_of_its_modules_and_no_others(name):
    model = calibrated(name)
    x, sites = images(), dict(quantizers(model))
    for unit in family_of(model).units(model):
        found: set[str] = set()
        with watching(sites, before=lambda name, _, found=found: found.add(name)):
            x = unit.run(x)
        inside = {key for key in sites if any(key.startswith(f"{part}.") or key == part for part in unit.modules)}
        assert found == inside, unit.name


def masks(tokens: int) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(2, 1, tokens, tokens, generator=generator) < 0.6
    seen[..., 0] = True  # a row that sees nothing has no softmax
    bias = torch.randn(tokens, tokens, generator=generator)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": bias},
        "infinite": {"attn_mask": torch.zeros(2, 1, tokens, tokens).masked_fill(~seen, float("-inf"))},
    }


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_masks_mean_what_they_mean_in_timm(fused):
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(3))
    for name in ("deit", "query_key_norm", "inner_norms"):
        plain, model = float_model(name), quantize(float_model(name), recipe(*[FLOAT_PROBS] * fused))
        for kind, mask in masks(17).items():
            with off(model):
                found = model.blocks[0](x, **mask)
            difference = (found - plain.blocks[0](x, **mask)).abs().max()
            assert difference <= (0 if fused else 1e-5), (name, kind)


@torch.no_grad()
def test_quantized_scores_do_not_let_masked_tokens_through():
    model = quantize(float_model("deit"), [Rule("*.attn.scores_quant", LSQ(4, init="lsq"))])
    InitSteps()(model, [images(4)])
    x = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(3))
    later = x.clone()
    later[:, 10:] = 0
    attn = model.blocks[0].attn
    for mask in ({"is_causal": True}, {"attn_mask": torch.ones(17, 17, dtype=torch.bool).tril()}):
        assert torch.equal(attn(x, **mask)[:, :10], attn(later, **mask)[:, :10]), mask
