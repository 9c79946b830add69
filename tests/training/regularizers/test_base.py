"""Contracts over every regularizer."""

from __future__ import annotations

import pytest
import torch

from qat import build_float, build_recipe, calibrate, quantize
from qat.errors import QatError
from qat.quantizers import LSQQuantizer
from qat.sites.insert import quantizers
from qat.training.regularizers import BinRegularizer, Dampening, Regularizer, named
from tests.conftest import TINY

every = pytest.mark.parametrize("kind", Regularizer.__subclasses__(), ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    built = quantize(build_float("deit_tiny_patch16_224", None, 10, TINY), build_recipe("vvtq", w_bits=3, a_bits=3))
    calibrate(built.eval(), [torch.randn(4, 3, 32, 32)])
    return built


@every
def test_is_a_loss_on_the_low_bit_weights_only(kind: type[Regularizer], model: torch.nn.Module) -> None:
    regularizer = kind()
    model.zero_grad()
    penalty = regularizer(model)
    penalty.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and name.endswith(".weight")}
    low_bit = {site.name.removesuffix("_quant") for site in regularizer.choose(model)}
    assert penalty.item() > 0
    assert touched == low_bit
    assert len(low_bit) == 2 * 4  # qkv, proj, fc1, fc2 in two blocks; patch_embed and head have 8 bits
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every
def test_is_zero_on_the_grid_and_has_no_gradient_there(kind: type[Regularizer], model: torch.nn.Module) -> None:
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for site in kind().choose(model):
            site.weight.copy_(site.quantizer(site.weight))
    model.zero_grad()
    penalty = kind()(model)
    penalty.backward()
    assert penalty.item() < 1e-9  # step * code / step is the code to one rounding
    assert all(p.grad.abs().max() < 1e-6 for p in model.parameters() if p.grad is not None)
    model.load_state_dict(kept)


@every
def test_sites_are_chosen_by_glob_and_width(kind: type[Regularizer], model: torch.nn.Module) -> None:
    assert [s.name for s in kind(sites="blocks.1.mlp.fc?.weight_quant").choose(model)] == [
        "blocks.1.mlp.fc1.weight_quant",
        "blocks.1.mlp.fc2.weight_quant",
    ]
    assert len(kind(max_bits=8).choose(model)) == 10
    with pytest.raises(QatError, match=r"at most 2 bits"):
        kind(max_bits=2).choose(model)
    with pytest.raises(QatError, match=r"nowhere"):
        kind(sites="nowhere").choose(model)


@every
def test_weight_rises_along_a_cosine(kind: type[Regularizer]) -> None:
    regularizer = kind(weight=0.01)
    # specification, section 3.3: T = 150, lmax = 0.01, start 0.25
    for t, wanted in [(0, 0), (37, 0), (37.5, 0), (38, 4.8738e-7), (40, 1.218e-5), (60, 9.549e-4), (75, 2.5e-3),
                      (93.75, 5e-3), (100, 5.868e-3), (120, 8.346e-3), (148, 9.992e-3), (150, 0.01)]:  # fmt: skip
        assert regularizer.weight_at(t / 150) == pytest.approx(wanted, rel=4e-4)  # as many digits as are printed


@pytest.mark.parametrize(("option", "value"), [("weight", 0), ("weight", -1), ("start", 1), ("start", -0.1)])
def test_bad_options(option: str, value: float) -> None:
    with pytest.raises(QatError, match=option):
        BinRegularizer(**{option: value})


def test_two_of_a_kind_have_names_of_their_own() -> None:
    assert list(named([BinRegularizer(), Dampening(), BinRegularizer()])) == [
        "bin_regularizer", "dampening", "bin_regularizer_2"
    ]  # fmt: skip


def test_names() -> None:
    assert BinRegularizer().name == "bin_regularizer"
    assert Dampening().name == "dampening"


def test_a_step_that_is_not_trained_gets_no_gradient(model: torch.nn.Module) -> None:
    steps = [q.step for _, q in quantizers(model) if isinstance(q, LSQQuantizer)]
    model.zero_grad()
    try:
        for step in steps:
            step.requires_grad_(False)
        BinRegularizer()(model).backward()
        assert all(step.grad is None for step in steps)
        assert all(site.weight.grad is not None for site in BinRegularizer().choose(model))
    finally:
        for step in steps:
            step.requires_grad_(True)
