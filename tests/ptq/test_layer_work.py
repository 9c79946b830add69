"""Moments of what reaches a layer, against the whole matrices. Shapes: I inputs and O outputs, n rows."""

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.layer_work import LayerWork
from qat.ptq.moments import Moments
from qat.ptq.unit_work import UnitWork
from qat.quantizers import Uniform
from qat.recipe import Rule
from qat.sites.hooks import watching
from qat.sites.insert import switched_off
from tests.ptq.test_work import started

COARSE = (Rule("*.weight_quant", Uniform(4)), Rule("*.input_quant", Uniform(2)))


def layer_of(here: UnitWork, name: str) -> LayerWork:
    product = next(product for product in here.products if product.right == f"{name}.weight_quant")
    layer = here.layer(product)
    assert layer is not None
    return layer


@torch.no_grad()
def inputs(here: UnitWork, name: str, floats: bool = False) -> list[Tensor]:
    """What reaches a layer, for each batch, before its own site quantizes it."""
    found: list[Tensor] = []
    layer, off = {name: here.model.get_submodule(name)}, here.off
    off = off if floats else [q for q in off if q is here.model.get_submodule(f"{name}.input_quant")]
    with switched_off(off), watching(layer, before=lambda _, args: found.append(args[0])):
        for x in here.float_inputs if floats else here.inputs:
            here.unit.run(x)
    return found


@torch.no_grad()
def expected(here: UnitWork, name: str, x: list[Tensor], floats: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """A^T A and A^T (X - X_q), float64, of tensors (B, ..., I)."""
    site = here.model.get_submodule(f"{name}.input_quant")
    q, rows = (torch.cat([t.flatten(0, -2) for t in ts]).double() for ts in ([site(t) for t in x], floats or x))
    A = torch.cat([q, torch.ones(len(q), 1)], 1)
    return A.T @ A, A.T @ (rows - q)


def assert_moments(found: Moments, expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found.gram, expected[0], rtol=1e-9, atol=1e-9)  # float64, in another order
    torch.testing.assert_close(found.cross, expected[1], rtol=1e-9, atol=1e-9)
    assert found.rows == expected[0][-1, -1]


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv", "blocks.1.mlp.fc2"])
def test_moments_are_those_of_the_whole_matrices(name):
    here = started(*COARSE)
    x = inputs(here, name)
    layer = layer_of(here, name)
    assert_moments(layer.moments, expected(here, name, x))
    assert layer.moments.cross.abs().max() > 1


def test_patches_are_the_rows_of_a_convolution():
    here = started(*COARSE, unit=0)
    layer, site = layer_of(here, "patch_embed.proj"), here.model.patch_embed.proj.input_quant
    with torch.no_grad():
        patches = torch.cat([
            x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
            for x in map(site, here.inputs)
        ]).double()  # fmt: skip
    torch.testing.assert_close(layer.moments.inputs_gram, patches.T @ patches, rtol=1e-9, atol=1e-6)
    assert layer.weight.shape == (24, 3 * 8 * 8)
    assert layer.moments.rows == len(patches)


def test_every_second_image_belongs_to_the_other_half():
    here, name = started(*COARSE, count=2, images=4), "blocks.1.mlp.fc1"
    x = inputs(here, name)
    for k, half in enumerate(layer_of(here, name).halves):
        assert_moments(half, expected(here, name, [batch[k::2] for batch in x]))


def test_windows_of_one_image_belong_to_one_half():
    """An image of Swin has 16 windows here, which are rows of the batch of attention."""
    here, name = started(*COARSE, name="swin", unit=1, images=2), "layers.0.blocks.0.attn.qkv"
    x = inputs(here, name)
    images = [batch.unflatten(0, (2, -1)) for batch in x]
    for k, half in enumerate(layer_of(here, name).halves):
        assert_moments(half, expected(here, name, [batch[k::2].flatten(0, 1) for batch in images]))


def test_batches_of_one_image_serve_both_halves():
    here = started(*COARSE, count=4, images=1)
    assert [half.rows for half in layer_of(here, "blocks.1.mlp.fc1").halves] == [34, 34]


def test_moments_with_the_float_model_have_the_weights_before_their_correction():
    here, name = started(*COARSE, floats=True), "blocks.1.mlp.fc1"
    floats = inputs(here, name, floats=True)
    here.remember()
    with torch.no_grad():
        here.model.blocks[1].attn.qkv.weight.mul_(1.5)
    x = inputs(here, name)
    assert_moments(layer_of(here, name).float_moments, expected(here, name, x, floats))


def test_a_convolution_without_a_bias_has_moments_with_the_float_model():
    here = started(Rule("patch_embed.*", Uniform(4)), floats=True, unit=0)
    here.model.patch_embed.proj.bias = None
    here.remember()
    assert layer_of(here, "patch_embed.proj").float_moments.rows == 2 * 2 * 16


@torch.no_grad()
def test_rows_count_by_their_importance():
    """With half of it, a row of importance 3 among those of 1 counts (1 + 3 / mean) / 2."""
    here, name = started(*COARSE), "blocks.1.mlp.fc1"
    importance = torch.ones(2, 17)
    importance[:, 0] = 3
    here.work.importance, here.work.importance_share = {name: [[importance], [importance]]}, 0.5
    layer, mean = layer_of(here, name), (3 + 16) / 17
    counts = layer.counts()
    assert counts[1][0][0, :2].tolist() == pytest.approx([(1 + 3 / mean) / 2, (1 + 1 / mean) / 2])
    assert torch.cat([x.flatten() for visits in counts for x in visits]).mean().item() == pytest.approx(1)
    x, site = inputs(here, name), here.model.blocks[1].mlp.fc1.input_quant
    q = torch.cat([site(batch).flatten(0, 1) for batch in x]).double()
    rows = torch.cat([visits[0].flatten() for visits in counts]).double()
    torch.testing.assert_close(layer.moments.inputs_gram, (q * rows[:, None]).T @ q, rtol=1e-6, atol=1e-6)


def test_nothing_is_kept_but_moments_and_only_until_the_product_is_done():
    here, name = started(*COARSE, floats=True), "blocks.1.mlp.fc1"
    here.remember()
    layer = layer_of(here, name)
    assert layer.moments.rows == layer.float_moments.rows
    kept = [value for value in vars(layer).values() if isinstance(value, Moments)]
    assert len(kept) == 2
    assert not any(isinstance(value, Tensor | list) for value in vars(layer).values())
    assert all(moments.gram.shape == (25, 25) for moments in kept)
    assert layer_of(here, name) is layer
    here.forget(layer.product)
    assert layer_of(here, name) is not layer


@torch.no_grad()
def test_a_weight_is_changed_in_its_own_shape():
    here = started(*COARSE, unit=0)
    layer = layer_of(here, "patch_embed.proj")
    weight, bias = layer.weight.clone(), layer.layer.bias.clone()
    layer.set_weight_(weight + 1)
    layer.add_bias_(torch.arange(24.0).double())
    assert torch.equal(layer.layer.weight, weight.view(24, 3, 8, 8) + 1)
    assert torch.equal(layer.layer.bias, bias + torch.arange(24.0))
    layer.layer.bias = None
    layer.add_bias_(torch.ones(24))  # stays without one


def test_a_layer_that_no_image_reaches_is_named():
    here = started(*COARSE)
    layer = layer_of(here, "blocks.1.mlp.fc1")
    here.inputs.clear()
    with pytest.raises(QatError, match=r"no calibration image reached 'blocks.1.mlp.fc1': raise calibration.images"):
        layer.moments  # noqa: B018
