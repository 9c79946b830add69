"""What a step of calibration may change, and what is put back when it fails."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from qat.models import build_float
from qat.ptq import InitSteps, Observe, OutputSearch, PTQMethod, RepQViT
from qat.ptq.base import undisturbed
from qat.recipe import build_recipe
from qat.sites.family import family_of
from qat.sites.insert import quantize, quantizers, weights

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def tiny(recipe: str = "uniform") -> nn.Module:
    torch.manual_seed(0)
    model = build_float("deit_tiny_patch16_224", None, 10, TINY).eval()
    return quantize(model, build_recipe(recipe, w_bits=4, a_bits=4))


def images(count: int = 2) -> list[Tensor]:
    return [torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """To the bit; NaN is equal to NaN."""
    return all(torch.equal(value.nan_to_num(7e9), second[name].nan_to_num(7e9)) for name, value in first.items())


def nothing() -> None:
    """Does not interrupt."""


def interrupt() -> None:
    raise KeyboardInterrupt


class Equalize(PTQMethod):
    """Doubles weights, biases and steps, which changes the model, then calls ``then``."""

    changes_weights = True

    def __init__(self, then: Callable[[], None] = nothing) -> None:
        self.then = then

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        InitSteps().calibrate(model, batches)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)
        model.train().requires_grad_(False)
        self.then()

    def wants(self, model: nn.Module) -> bool:
        return True


class Reconstruct(PTQMethod):
    """Trains the weights of every unit towards the float output of the unit, with gradients."""

    changes_weights = needs_gradients = True

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        for unit in family_of(model).units(model):
            trained = [p for name, p in unit.named_parameters(model) if name.endswith((".weight", ".bias"))]
            (x,) = batches
            loss = (unit.run(x) - 1).square().mean()
            loss.backward()
            with torch.no_grad():
                for parameter in trained:
                    parameter -= 0.01 * parameter.grad
                batches = [unit.run(x)]

    def wants(self, model: nn.Module) -> bool:
        return True


@pytest.mark.parametrize("start", ["uncalibrated", "calibrated"])
def test_an_interrupted_step_that_changes_weights_leaves_the_model_as_it_was(start):
    model = tiny().train()
    if start == "calibrated":
        InitSteps()(model, images())
    model.head.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones(24)
    before = state(model)
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        Equalize(interrupt)(model, images())
    assert same(before, state(model))
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    Equalize()(model, images())
    assert torch.equal(model.head.weight, 2 * before["head.weight"])


def test_a_step_that_changes_quantizers_only_copies_no_weight(monkeypatch):
    model, copied = tiny(), []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda x, *args, **options: copied.append(x.numel()) or clone(x))

    class Nothing(PTQMethod):
        def calibrate(self, model, batches):
            pass

    Nothing()(model, [])
    assert sum(copied) == sum(x.numel() for _, q in quantizers(model) for x in (*q.parameters(), *q.buffers()))
    assert [kind.changes_weights for kind in (InitSteps, Observe, OutputSearch, RepQViT)] == [False, False, False, True]


def test_a_calibrated_quantizer_gets_its_values_back_after_an_error():
    class Fails(PTQMethod):
        def calibrate(self, model, batches):
            for _, quantizer in quantizers(model):
                quantizer.step.fill_(3.0)
            raise OSError("the disk is gone")

    model = tiny()
    InitSteps()(model, images())
    model.head.input_quant.step.data.fill_(torch.nan)
    before = state(model)
    with pytest.raises(OSError, match="disk"):
        Fails()(model, images())
    assert same(before, state(model))


def test_a_step_with_gradients_improves_a_calibrated_model():
    model = tiny()
    InitSteps()(model, images())

    def error() -> float:
        with torch.no_grad():
            return float((model(images()[0]) - 1).square().mean())

    before, sites = error(), {site.name: site.weight.clone() for site in weights(model)}
    assert not torch.is_inference_mode_enabled()
    with torch.no_grad():  # as in the setup of a validation
        Reconstruct()(model, images())
    assert error() < before
    assert all(not torch.equal(site.weight, sites[site.name]) for site in weights(model))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_method_wants_what_is_not_calibrated_unless_it_says_otherwise():
    model = tiny()
    assert InitSteps().wants(model)
    InitSteps()(model, images())
    assert not InitSteps().wants(model)
    assert Reconstruct().wants(model)
    assert not InitSteps().wants(build_float("deit_tiny_patch16_224", None, 10, TINY))


def test_a_method_may_leave_switches_in_any_position():
    class Careless(PTQMethod):
        def calibrate(self, model, batches):
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
            model.requires_grad_(False)
            for _, quantizer in quantizers(model):
                quantizer.enabled = False

    model = tiny().train()
    model.head.weight.requires_grad_(False)
    model.head.input_quant.enabled = False
    Careless()(model, [])
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert [name for name, quantizer in quantizers(model) if not quantizer.enabled] == ["head.input_quant"]
    with undisturbed(model):
        assert not model.training
    assert model.training


def test_a_method_without_a_repr_of_its_own_is_told_by_its_options():
    class Own(PTQMethod):
        def __init__(self, rate: float) -> None:
            self.rate = rate
            self._cached = object()

        def calibrate(self, model, batches):
            self.report["seen"] = 3

    method = Own(0.5)
    method(nn.Linear(1, 1), [])
    assert repr(method) == "Own(rate=0.5)"
