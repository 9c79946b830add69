"""What every method of calibration promises, on a tiny ViT, a DeiT with distillation token and a Swin."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import qat.ptq
from qat.models import build_float
from qat.models.vit import QuantBlock
from qat.ptq import InitSteps, Observe, OutputSearch, PTQMethod, RepQViT
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers, switched_off

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
MODELS = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A method, and a recipe that it fills."""

    method: PTQMethod
    recipe: str
    bits: int

    @property
    def plain(self) -> list[Rule]:
        """Uniform steps at the same sites and widths, which min-max ranges then fill."""
        name = "uniform_full" if self.recipe.startswith("fq_vit") else self.recipe
        name = "uniform" if isinstance(self.method, RepQViT) else name
        attention = {"class_path": "Uniform", "init_args": {"bits": 4, "zero": "code"}}
        few = [{"match": "*.attn.probs_quant", "spec": attention}] if "884" in self.recipe else []
        return build_recipe(name, few, w_bits=self.bits, a_bits=self.bits)

    def __repr__(self) -> str:
        options = getattr(self.method, "observer", "")
        return f"{type(self.method).__name__}{options and '_'}{options}-{self.recipe}"


CASES = [
    Case(InitSteps(), "vvtq", 4),
    Case(InitSteps(), "repq_vit", 4),
    *(Case(Observe(observer=kind), "uniform", 4) for kind in ("minmax", "ema", "percentile", "omse")),
    Case(Observe(), "uniform_full", 8),
    *(Case(Observe(), f"fq_vit_{bits}", 8) for bits in ("888", "884", "888_released", "884_released")),
    Case(RepQViT(), "repq_vit", 4),
    Case(RepQViT(), "repq_vit_released", 4),
    *(Case(RepQViT(), f"bitlog2_{form}{end}", 4)
      for form in ("single_16", "single_17", "half_16", "half_17") for end in ("", "_released")),
    Case(OutputSearch(), "uniform", 4),
    Case(OutputSearch(), "vvtq", 4),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_model = pytest.mark.parametrize("name", MODELS)


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(count)]
    return [x * x.abs() for x in found]  # with outliers


@cache
def _float_model(name: str) -> nn.Module:
    arch, arguments = MODELS[name]
    torch.manual_seed(0)
    model = build_float(arch, None, 10, arguments).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # norms and biases of a fresh model hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if "norm" in key or "bias" in key else 0.05)
            if "norm" in key and key.endswith("weight"):
                parameter[3] = 0  # a dead channel, and two of outliers, as trained transformers have them
                parameter[5:7] *= 8
                parameter[8] = 1e-6  # almost dead
            if key.startswith("patch_embed"):
                parameter[7] *= 30  # the residual stream has channels of its own size, which is what PTF is for
    return model


def uncalibrated(name: str, case: Case) -> nn.Module:
    rules = build_recipe(case.recipe, w_bits=case.bits, a_bits=case.bits)
    return quantize(copy.deepcopy(_float_model(name)), rules)


@cache
def _calibrated(name: str, case: Case) -> nn.Module:
    model = uncalibrated(name, case)
    case.method(model, batches())
    return model


def calibrated(name: str, case: Case) -> nn.Module:
    return copy.deepcopy(_calibrated(name, case))


def switches(model: nn.Module) -> list[bool]:
    """Everything that a method may switch while it works."""
    return [
        *(module.training for module in model.modules()),
        *(parameter.requires_grad for parameter in model.parameters()),
        *(quantizer.enabled for _, quantizer in quantizers(model)),
    ]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_every_method_has_a_case():
    shown = {type(case.method).__name__ for case in CASES}
    missing = [kind.__name__ for kind in PTQMethod.__subclasses__() if kind.__name__ not in shown]
    assert not missing, f"add a Case for {missing} at the top of this file"
    assert {kind.__name__ for kind in PTQMethod.__subclasses__()} <= set(qat.ptq.__all__)


@every_model
@every_case
@torch.no_grad()
def test_no_site_is_left_out_and_no_hook_is_left_behind(case, name):
    model = calibrated(name, case)
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))
    assert hooks(model) == 0
    assert model(batches(1, seed=1)[0]).isfinite().all()


@every_model
@every_case
@torch.no_grad()
def test_structure_is_what_the_recipe_builds(case, name):
    model, fresh = calibrated(name, case), uncalibrated(name, case)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert [type(module) for module in fresh.modules()] == [type(module) for module in model.modules()]
    images = batches(1, seed=1)[0]
    assert torch.equal(fresh(images), model(images))


@every_case
def test_switches_are_put_back(case):
    model = uncalibrated("vit", case)
    model.train()
    model.head.requires_grad_(False)
    before = switches(model)
    case.method(model, batches())
    assert switches(model) == before


@every_case
@pytest.mark.parametrize("after", [0, 3, 30])
def test_an_interrupt_leaves_no_trace(case, after, monkeypatch):
    """Wherever it comes: in the model, after some sites, or while the images are read."""

    def interrupted() -> Iterator[Tensor]:
        yield from batches(2)
        raise KeyboardInterrupt

    model = uncalibrated("vit", case)
    before, kinds, state = switches(model), [type(module) for module in model.modules()], model.state_dict()
    state = {key: value.clone() for key, value in state.items()}
    calls, forward = itertools.count(), QuantBlock.forward

    def fails(self: QuantBlock, *args: Tensor) -> Tensor:
        if next(calls) == after:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(QuantBlock, "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        case.method(model, interrupted())
    monkeypatch.undo()
    assert switches(model) == before
    assert hooks(model) == 0
    assert [type(module) for module in model.modules()] == kinds
    assert all(value.equal(state[key]) or value.isnan().all() for key, value in model.state_dict().items())
    case.method(model, batches())
    expected = calibrated("vit", case).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@every_case
def test_the_same_images_give_the_same_values(case):
    model = uncalibrated("swin", case)
    case.method(model, batches())
    expected = calibrated("swin", case).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@every_model
@every_case
@torch.no_grad()
def test_the_float_function_stays(case, name):
    model, images = calibrated(name, case), batches(1, seed=1)[0]
    with switched_off(quantizer for _, quantizer in quantizers(model)):
        torch.testing.assert_close(model(images), _float_model(name)(images), atol=1e-4, rtol=1e-4)


@every_model
@every_case
@torch.no_grad()
def test_the_error_is_not_above_that_of_plain_ranges(case, name):
    plain = quantize(copy.deepcopy(_float_model(name)), case.plain)
    Observe(observer="minmax")(plain, batches())
    images = torch.cat(batches())
    expected = _float_model(name)(images)
    error, bound = ((m(images) - expected).norm() / expected.norm() for m in (calibrated(name, case), plain))
    blind = getattr(case.method, "observer", "") in ("ema", "percentile")  # they clip without looking at the error
    assert error <= bound * (1.25 if blind else 1.001), f"{error:.3f} above {bound:.3f}"
