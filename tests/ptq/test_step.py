"""How the steps of a calibration follow each other, what they leave alone, and what is put back."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq import InitSteps, OutputSearch
from qat.ptq.base import PTQMethod
from qat.ptq.choose_softmax import ChooseSoftmax
from qat.ptq.fold_norms import FoldNorms
from qat.ptq.frontier import Frontier
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.rotate_heads import RotateHeads
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Steps
from qat.ptq.tensor_search import TensorSearch
from qat.ptq.unit_work import UnitWork
from qat.ptq.weight_correction import GPTQ, BiasCorrection, Ridge
from qat.ptq.work import Work
from qat.quantizers import LSQ, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.family import family_of
from qat.sites.insert import quantizers
from tests.ptq.test_output_search import batches, tiny

FRONTIER = build_recipe("frontier", w_bits=4, a_bits=4)
FRACTIONAL = Uniform(4, granularity="channel", zero="fractional")


class Told(Step):
    """Writes down when it is called."""

    stage = Stage.SEARCH

    def __init__(self, calls: list[str], stage: Stage = Stage.SEARCH) -> None:
        self.stage, self.calls = stage, calls

    def begin(self, work: Work) -> None:
        self.calls.append(f"{self.stage.name} begins")

    def unit(self, here: UnitWork) -> None:
        self.calls.append(f"{self.stage.name} {here.unit.name}")

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        self.calls.append(f"{self.stage.name} {product.left}")

    def finish(self, here: UnitWork) -> None:
        self.calls.append(f"{self.stage.name} {here.unit.name} is complete")


class ChangeNorm(Step):
    """A faulty rewrite: it changes a norm, and nothing that undoes it."""

    stage = Stage.REWRITE
    changes_weights = True

    def unit(self, here: UnitWork) -> None:
        if here.unit.name == "blocks.1":
            here.model.blocks[1].norm1.weight.mul_(1.1)


class Interrupt(Step):
    """Fails at a product of the last block, after the steps before it have worked there."""

    stage = Stage.BIAS

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        if product.left == "blocks.1.mlp.fc1.input_quant":
            raise KeyboardInterrupt


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of what is not the same to the bit; NaN is equal to NaN."""
    now = model.state_dict()
    return {name for name, x in before.items() if not torch.equal(x.nan_to_num(7e9), now[name].nan_to_num(7e9))}


def test_the_order_of_calls():
    calls: list[str] = []
    Steps([Told(calls, stage) for stage in Stage])(tiny(), batches())
    first, second, *_ = family_of(tiny()).units(tiny())
    inside = ("attn.qkv.input", "attn.q", "attn.probs", "attn.proj.input", "mlp.fc1.input", "mlp.fc2.input")
    what = ["begins", first.name, "patch_embed.proj.input_quant", f"{first.name} is complete", second.name]
    what += [f"blocks.0.{left}_quant" for left in inside] + [f"{second.name} is complete"]
    expected = [f"{stage.name} {event}" for event in what for stage in Stage]
    assert calls[: len(expected)] == expected
    assert set(Counter(calls).values()) == {1}


def test_what_no_step_fills_starts_by_the_init_of_its_spec():
    """In the first block, where nothing has been quantized before: the same as by `InitSteps`."""
    spec = LSQ(8, init="percentile", percentile=100)
    rules = [Rule("blocks.0.*residual_quant", spec), Rule("blocks.0.mlp.fc1.*", spec)]
    model, plain, bare = tiny("deit", *rules), tiny("deit", *rules), Told([])
    bare(model, batches())
    InitSteps()(plain, batches())
    names = [name for name, _ in quantizers(model)]
    assert len(names) == 5
    assert not changed(model, {f"{name}.step": plain.get_submodule(name).step for name in names})


METHODS = [
    Frontier(rounds=1, rows=34),
    Steps([TensorSearch(), ChooseSoftmax(), Ridge(), GPTQ(), BiasCorrection()]),
    RotateHeads(optional=True),
    FoldNorms(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("site", ["blocks.0.attn.q_quant", "blocks.1.attn.proj.weight_quant", "head.input_quant"])
def test_calibrated_sites_and_their_layers_are_left_alone(method, site):
    model = tiny("deit", *FRONTIER)
    InitSteps()(model, batches())
    with torch.no_grad():
        for tensor in (*model.get_submodule(site).parameters(), *model.get_submodule(site).buffers()):
            tensor.fill_(torch.nan)
    before = state(model)
    method(model, batches())
    layer = {f"{site.removesuffix('weight_quant')}{name}" for name in ("weight", "bias")} if "weight" in site else set()
    assert changed(model, before) <= layer | {f"{site}.step", f"{site}.zero_point"}
    assert model.get_submodule(site).calibrated


@pytest.mark.parametrize("weights", [False, True])
def test_without_open_sites_nothing_changes(weights):
    model = tiny("deit", *FRONTIER)
    InitSteps()(model, batches())
    before = state(model)
    (Frontier() if weights else OutputSearch())(model, batches())
    assert not changed(model, before)


def test_an_interrupted_list_puts_back_weights_parameters_and_quantizers():
    model = tiny("deit", *FRONTIER).train()
    with torch.no_grad():
        model.blocks[0].attn.probs_quant.enabled = False
    before, kinds = state(model), [type(module) for module in model.modules()]
    method = Steps(
        [RotateHeads(), FoldNorms(), TensorSearch(), ChooseSoftmax(rows=34), Ridge(), GPTQ(), Interrupt()],
        importance=0.5,
    )
    with pytest.raises(KeyboardInterrupt):
        method(model, batches())
    assert not changed(model, before)
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for _, parameter in model.named_parameters())
    assert [name for name, quantizer in quantizers(model) if not quantizer.enabled] == ["blocks.0.attn.probs_quant"]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_rewrite_that_changes_a_unit_is_refused_by_its_name():
    model = tiny()
    before = state(model)
    with pytest.raises(
        QatError, match=r"a rewrite changed the float model: what blocks\.1 computes, by .*rewrites none"
    ):
        Steps([ChangeNorm(), TensorSearch()])(model, batches())
    assert not changed(model, before)


@pytest.mark.parametrize("method", [TensorSearch(), OutputSearch(), Frontier()], ids=lambda x: type(x).__name__)
def test_without_images_the_first_site_is_named(method):
    model = tiny()
    with pytest.raises(QatError, match=r"no calibration image reached 'patch_embed.proj.input_quant': raise calibr"):
        method(model, [])


def test_a_site_that_no_unit_reaches_is_named():
    model = tiny()
    model.blocks[1].elsewhere_quant = LSQ(4).build(model.blocks[1].attn.q_quant.layout)
    with pytest.raises(QatError, match=r"no calibration image reached 'blocks\.1\.elsewhere_quant'"):
        TensorSearch()(model, batches())


@pytest.mark.parametrize("method", [TensorSearch(), OutputSearch()], ids=lambda x: type(x).__name__)
def test_a_weight_that_is_not_finite_is_named_as_such(method: PTQMethod):
    model = tiny()
    with torch.no_grad():
        model.head.weight[3, 3] = torch.nan
    with pytest.raises(QatError, match=r"'head.weight_quant'.*not finite"):
        method(model, batches())


def test_a_refusal_comes_before_any_work():
    model = tiny("deit", *build_recipe("uniform", w_bits=4, a_bits=4), Rule("head.weight_quant", FRACTIONAL))
    before = state(model)
    with pytest.raises(QatError, match=r"GPTQ rounds to evenly spaced values, and 'head.weight_quant' has Uniform\("):
        Steps([FoldNorms(), TensorSearch(), GPTQ()])(model, (1 / 0 for _ in range(2)))
    assert not changed(model, before)
