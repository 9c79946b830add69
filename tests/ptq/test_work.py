"""What steps share on one unit of a tiny model. Shapes: B images, N tokens, G groups that share a step."""

import pytest
import torch
from torch import Tensor

from qat.ptq import InitSteps, OutputSearch
from qat.ptq.matrix_products import matrix_products
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work, drawn
from qat.quantizers import Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.family import Unit, family_of
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, switched_off
from tests.ptq.test_output_search import batches, tiny

SITES = ("blocks.1.attn.q_quant", "blocks.1.mlp.fc1.input_quant")


def started(
    *rules: Rule, prefix: str = "quantized", floats: bool = False, name: str = "deit", count: int = 2, images: int = 2,
    unit: int = 2, seed: int = 0,
) -> UnitWork:  # fmt: skip
    """The work on a unit, the second block, when all sites have their first parameters."""
    model = tiny(name, *rules)
    names, tensors = [site for site, _ in quantizers(model)], batches(count, images, seed)
    InitSteps()(model, tensors)
    units = family_of(model).units(model)
    with torch.no_grad():
        inputs = [through(units[:unit], x) for x in tensors]
        with switched_off(quantizer for _, quantizer in quantizers(model)):
            before = [through(units[:unit], x) for x in tensors] if floats else None
    work = Work(model, {site: model.get_submodule(site) for site in names}, OutputSearch())
    return UnitWork(work, units[unit], inputs, before, matrix_products(model), prefix)


def through(units: list[Unit], x: Tensor) -> Tensor:
    for unit in units:
        x = unit.run(x)
    return x


def seen(here: UnitWork, inputs: list[Tensor], off: bool) -> dict[str, list[Tensor]]:
    """What reaches the sites when the whole unit runs."""
    found: dict[str, list[Tensor]] = {}
    sites = {name: here.model.get_submodule(name) for name in SITES}
    with (
        switched_off(here.off if off else []),
        watching(sites, before=lambda name, args: found.setdefault(name, []).append(args[0])),
    ):
        for x in inputs:
            here.unit.run(x)
    return found


def assert_equal(visits: list[dict[str, list[Tensor]]], expected: dict[str, list[Tensor]]) -> None:
    for name in SITES:
        found = [x for batch in visits for x in batch[name]]
        assert all(torch.equal(x, y) for x, y in zip(found, expected[name], strict=True))


@torch.no_grad()
def test_tensors_are_those_of_the_quantized_unit_or_of_the_float_one():
    here = started()
    assert_equal(list(here.watched(SITES, quantized=True)), seen(here, here.inputs, off=False))
    assert_equal(list(here.watched(SITES, quantized=False)), seen(here, here.inputs, off=True))
    here.prefix = "float"
    assert_equal(list(here.watched(SITES, quantized=True)), seen(here, here.inputs, off=True))
    assert all(quantizer.enabled for quantizer in here.off)


@torch.no_grad()
def test_the_float_model_is_that_before_weights_were_corrected():
    here = started(floats=True)
    expected, outputs = seen(here, here.float_inputs, off=True), [here.unit.run(x) for x in here.float_inputs]
    with switched_off(here.off):
        outputs = [here.unit.run(x) for x in here.float_inputs]
    here.remember()
    qkv, (product, *_) = here.model.blocks[1].attn.qkv, here.products
    kept = qkv.weight.clone(), qkv.bias.clone()
    qkv.weight += 1
    qkv.bias -= 1
    assert_equal(list(here.float_watched(SITES)), expected)
    assert all(torch.equal(x, y) for x, y in zip(here.float_outputs, outputs, strict=True))
    assert product.left == "blocks.1.attn.qkv.input_quant"
    assert all(torch.equal(x, y) for x, y in zip(here.originals.of(product), kept, strict=True))
    assert torch.equal(qkv.weight, kept[0] + 1)


@torch.no_grad()
def test_nothing_is_switched_while_the_tensors_of_a_batch_are_used():
    """What reads them calls sites and layers: with its switches, and with the weights as they are now."""
    here = started(floats=True)
    here.remember()
    qkv = here.model.blocks[1].attn.qkv
    qkv.weight += 1
    now = qkv.weight.clone()
    for visits in (here.watched(SITES, quantized=False), here.float_watched(SITES)):
        for _ in visits:
            assert all(quantizer.enabled for quantizer in here.off)
            assert torch.equal(qkv.weight, now)


@torch.no_grad()
def test_a_unit_ends_at_the_last_site_that_is_wanted():
    here, calls = started(), []
    here.model.blocks[1].mlp.fc2.register_forward_hook(lambda *_: calls.append(1))
    list(here.watched(SITES, quantized=True))
    assert not calls


def test_products_are_those_of_the_unit_in_the_order_of_the_network():
    here = started()
    lefts = ("attn.qkv.input", "attn.q", "attn.probs", "attn.proj.input", "mlp.fc1.input", "mlp.fc2.input")
    assert [product.left for product in here.products] == [f"blocks.1.{left}_quant" for left in lefts]
    assert list(here.wanted_activations()) == [
        f"blocks.1.{site}_quant"
        for site in ("attn.qkv.input", "attn.q", "attn.k", "attn.probs", "attn.v", *(f"{x}.input" for x in (
            "attn.proj", "mlp.fc1", "mlp.fc2")))
    ]  # fmt: skip
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert [site.name for site in here.wanted_weights()] == [f"blocks.1.{layer}.weight_quant" for layer in layers]


def test_visits_are_counted_where_a_unit_applies_a_module_twice():
    here, site = started(name="sret", count=1, unit=1), "stages.0.blocks.0.attn.qkv.input_quant"
    assert "stages.0.blocks.0" in here.unit.modules
    assert set(here.visits.values()) <= {1, 2}
    assert here.visits[site] == 2
    with torch.no_grad():
        (visits,) = here.watched([site], quantized=False)
    assert len(visits[site]) == 2


@torch.no_grad()
def test_samples_have_all_groups_and_about_as_many_values_as_wanted():
    here = started(*build_recipe("frontier", w_bits=4, a_bits=4))
    sites = {name: here.model.get_submodule(name) for name in SITES}
    found = here.samples(sites, 40)
    assert {name: rows.shape for name, rows in found.items()} == {SITES[0]: (3, 40), SITES[1]: (1, 40)}
    whole = seen(here, here.inputs, off=True)
    values = sites[SITES[0]].grouped(torch.cat(whole[SITES[0]]))
    assert all(set(rows.tolist()) <= set(each.tolist()) for rows, each in zip(found[SITES[0]], values, strict=True))
    assert here.samples({}, 40) == {}


def test_a_quantizer_that_is_replaced_becomes_a_rule():
    here, spec = started(), Uniform(4, granularity="head")
    here.work.method.chosen = {}
    old = here.model.get_submodule(SITES[0])
    new = spec.build(old.layout)
    here.replace(SITES[0], new)
    assert here.model.get_submodule(SITES[0]) is here.work.wanted[SITES[0]] is new
    assert here.work.method.chosen == {SITES[0]: spec.to_dict()}
    assert any(quantizer is new for quantizer in here.off)
    assert not any(quantizer is old for quantizer in here.off)


@pytest.mark.parametrize("first", [0, 2])
def test_entries_are_drawn_at_random_in_their_order(first):
    x = torch.arange(100.0)[None].repeat(2, 1)
    found = drawn(x, 10, axis=1, first=first)
    assert torch.equal(found, drawn(x, 10, axis=1, first=first))
    assert found.shape == (2, 10)
    assert torch.equal(found[0], found[0].sort().values)
    assert found[0, :first].tolist() == list(range(first))
    assert len(found[0].unique()) == 10
    assert found[0].diff().max() > 1, "not the first ones"
    assert drawn(x, 100, axis=1) is x
