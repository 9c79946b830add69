"""The choice of a quantizer for probabilities, on tiny models."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.choose_softmax import KINDS, ChooseSoftmax, candidates
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.output_search import OutputSearch
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Steps
from qat.ptq.tensor_search import TensorSearch
from qat.ptq.unit_work import UnitWork
from qat.quantizers import LogIntSoftmax, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantizers
from tests.ptq.test_output_search import batches, tiny

NAMES = {"Uniform", "LogSqrt2", "BitLog2", "AdaLog"}


def recipe(bits: int = 3) -> list[Rule]:
    return build_recipe("frontier", w_bits=bits, a_bits=bits)


def sites(model: nn.Module) -> dict[str, nn.Module]:
    return {name: q for name, q in quantizers(model) if name.endswith("probs_quant")}


class Compare(Step):
    """Measures what a product of probabilities and values loses on all images."""

    stage = Stage.WEIGHTS

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        if product.left.endswith("probs_quant"):
            probs, values = (here.model.get_submodule(name) for name in product.activations)
            seen = list(here.watched(product.activations, quantized=True))
            pairs = [(p, v) for visits in seen for p, v in zip(*visits.values(), strict=True)]
            error = sum(float((probs(p) @ values(v) - p @ v).square().sum()) for p, v in pairs)
            self.errors[product.left] = error / sum((p @ v).numel() for p, v in pairs)


@pytest.mark.parametrize("name", ["deit", "swin", "sret"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_choice_is_told_and_has_the_least_error(name, bits):
    model, compare = tiny(name, *recipe(bits)), Compare()
    method = Steps([TensorSearch(), ChooseSoftmax(), compare])
    method(model, batches())
    assert json.loads(json.dumps([method.chosen, method.report])) == [method.chosen, method.report], "plain data"
    assert method.report["softmax"].keys() == sites(model).keys()
    before = {site: quantizer.spec for site, quantizer in sites(tiny(name, *recipe(bits))).items()}
    other = {site: q.spec.to_dict() for site, q in sites(model).items() if q.spec != before[site]}
    assert method.chosen == other, "rules for what is not that of the recipe"
    for site, quantizer in sites(model).items():
        told = method.report["softmax"][site]
        assert told["errors"].keys() == NAMES
        assert told["chosen"] == min(told["errors"], key=told["errors"].get) == type(quantizer.spec).__name__
        assert quantizer.spec.granularity == "head"
        assert quantizer.spec.levels <= 2**bits
        if name != "sret":  # which applies a block twice; its second input was that with the old quantizer
            error = told["errors"][told["chosen"]]
            assert error == pytest.approx(compare.errors[site], rel=1e-4)  # means of float32


def test_at_most_two_to_the_power_of_bits_values_are_used():
    probs = torch.rand(2, 3, 50, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for bits in (2, 3, 4):
        for spec in candidates(Uniform(bits), KINDS):
            quantizer = spec.build(sites(tiny("deit", *recipe()))["blocks.0.attn.probs_quant"].layout)
            quantizer.init_from(quantizer.grouped(probs))
            assert all(head.unique().numel() <= 2**bits for head in quantizer(probs).unbind(1)), spec


def test_the_choice_is_better_than_what_the_recipe_has():
    errors = []
    for steps in ([], [ChooseSoftmax()]):
        compare = Compare()
        Steps([TensorSearch(), *steps, OutputSearch(rounds=1), compare])(tiny("deit", *recipe()), batches())
        errors.append(compare.errors["blocks.0.attn.probs_quant"])
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_recipe_and_choice_build_the_model(mode):
    model = getattr(tiny("swin", *recipe()), mode)()
    method = Steps([TensorSearch(), ChooseSoftmax(kinds=["uniform", "bitlog2"]), OutputSearch(rounds=1, levels=1)])
    method(model, batches())
    assert all(module.training == (mode == "train") for module in model.modules())
    chosen = [{"match": site, "spec": spec} for site, spec in method.chosen.items()]
    fresh = tiny("swin", *build_recipe("frontier", chosen, w_bits=3, a_bits=3))
    assert [type(module) for module in fresh.modules()] == [type(module) for module in model.modules()]
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(batches()[0]), model.eval()(batches()[0]))


def test_what_is_told_is_of_the_last_call():
    method = Steps([TensorSearch(), ChooseSoftmax(kinds=["uniform"])])
    method(tiny("deit", *recipe()), batches())
    kept = copy.deepcopy(method.chosen)
    calibrated = tiny("deit", *recipe())
    TensorSearch()(calibrated, batches())
    method(calibrated, batches())
    assert kept
    assert not method.chosen
    assert not method.report
    assert not Steps([ChooseSoftmax()]).chosen, "those of another method"


def test_switches_of_replaced_quantizers_stay():
    model = tiny("deit", *recipe())
    model.blocks[1].attn.probs_quant.enabled = False
    Steps([TensorSearch(), ChooseSoftmax(kinds=["uniform"])])(model, batches())
    assert [name for name, quantizer in quantizers(model) if not quantizer.enabled] == ["blocks.1.attn.probs_quant"]


@pytest.mark.parametrize("site", ["blocks.0.attn.probs_quant", "blocks.1.attn.probs_quant"])
def test_an_interrupt_puts_the_old_quantizers_back(site, monkeypatch):
    model, replace = tiny("deit", *recipe()), UnitWork.replace
    before, state = sites(model), copy.deepcopy(model.state_dict())

    def interrupt(here: UnitWork, name: str, quantizer: nn.Module) -> None:
        replace(here, name, quantizer)
        if name == site:
            raise KeyboardInterrupt

    monkeypatch.setattr(UnitWork, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Steps([TensorSearch(), ChooseSoftmax(kinds=["uniform"])])(model, batches())
    assert all(quantizer is before[name] for name, quantizer in sites(model).items())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x.nan_to_num(7e9), state[name].nan_to_num(7e9)) for name, x in model.state_dict().items())


def test_calibrated_probabilities_and_those_in_floating_point_are_left_alone():
    model = tiny("deit", *recipe(), Rule("blocks.0.attn.probs_quant", None))
    TensorSearch()(model, batches())
    with torch.no_grad():
        model.head.input_quant.step.fill_(torch.nan)
    before = sites(model)
    method = Steps([TensorSearch(), ChooseSoftmax()])
    method(model, batches())
    assert sites(model) == before
    assert not method.chosen


def kinds(bits: int, *names: str) -> list[str]:
    return [type(spec).__name__ for spec in candidates(Uniform(bits, granularity="head"), names or KINDS)]


def test_candidates_have_the_bits_of_the_recipe_and_some_have_too_few():
    assert kinds(4) == ["Uniform", "LogSqrt2", "BitLog2", "AdaLog"]
    assert kinds(5) == kinds(8) == ["Uniform", "LogSqrt2", "AdaLog"]
    assert kinds(9) == ["Uniform"], "logarithms have at most 8 bits"
    assert {spec.width for spec in candidates(Uniform(3), KINDS)} == {3}


def run(kinds: list[str], bits: int) -> Tensor:
    model = tiny("deit", *recipe(), Rule("*.probs_quant", Uniform(bits)))
    ChooseSoftmax(kinds=kinds)(model, batches())
    return model(batches()[0])


def test_kinds_that_do_not_fit_are_refused():
    with pytest.raises(QatError, match="ChooseSoftmax: kinds is empty: give some of uniform, logsqrt2"):
        ChooseSoftmax(kinds=[])
    with pytest.raises(QatError, match=r"ChooseSoftmax: kinds is \['log'\]: give a list"):
        ChooseSoftmax(kinds=["log"])
    with pytest.raises(QatError, match=r"ChooseSoftmax: .* 5 bits.*'blocks\.0\.attn\.probs_quant'"):
        run(["bitlog2"], 5)


@pytest.mark.parametrize("rule", [Rule("*.probs_quant", None), Rule("*.probs_quant", LogIntSoftmax(4))])
def test_a_recipe_without_probabilities_to_choose_for_is_refused(rule):
    model = tiny("deit", *recipe(), rule)
    with pytest.raises(QatError, match="ChooseSoftmax finds no site probs_quant that is quantized and multiplied"):
        ChooseSoftmax()(model, batches())
