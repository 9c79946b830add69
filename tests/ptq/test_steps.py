"""Lists of steps: their order, and what the units of a model see. Shapes: B images."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.choose_softmax import ChooseSoftmax
from qat.ptq.fold_norms import FoldNorms
from qat.ptq.output_search import OutputSearch
from qat.ptq.rotate_heads import RotateHeads
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Steps
from qat.ptq.tensor_search import TensorSearch
from qat.ptq.unit_work import UnitWork
from qat.ptq.weight_correction import GPTQ, BiasCorrection, Ridge
from qat.recipe import build_recipe
from qat.sites.family import family_of
from qat.sites.insert import quantizers, switched_off
from tests.ptq.test_output_search import batches, tiny


class Record(Step):
    """Keeps what reaches every unit."""

    stage = Stage.BIAS

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def unit(self, here: UnitWork) -> None:
        self.seen[here.unit.name] = [x.clone() for x in here.inputs]


def chained(model: nn.Module) -> dict[str, list[Tensor]]:
    """What reaches every unit of a model, for each batch."""
    found, tensors = {}, batches()
    with torch.no_grad():
        for unit in family_of(model).units(model):
            found[unit.name] = tensors
            tensors = [unit.run(x) for x in tensors]
    return found


def assert_same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, y) for name in found for x, y in zip(found[name], expected[name], strict=True))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "Steps: the list is empty: name at least one step"),
        (
            [OutputSearch(), TensorSearch()],
            "Steps: TensorSearch comes after OutputSearch: the order is rewrites",
        ),
        ([TensorSearch(), FoldNorms()], "Steps: FoldNorms comes after TensorSearch"),
        ([BiasCorrection(), Ridge()], "Steps: Ridge comes after BiasCorrection"),
        ([GPTQ(), ChooseSoftmax()], "Steps: ChooseSoftmax comes after GPTQ"),
    ],
)
def test_a_list_that_is_empty_or_out_of_order_is_refused(steps, message):
    with pytest.raises(QatError, match=message):
        Steps(steps)


def test_an_option_out_of_range_is_refused():
    with pytest.raises(QatError, match="Steps: importance is 2"):
        Steps([OutputSearch()], importance=2)


@pytest.mark.parametrize(
    "step",
    [RotateHeads(), FoldNorms(), TensorSearch(), OutputSearch(rounds=1, levels=1), Ridge(), GPTQ(), BiasCorrection()],
    ids=lambda step: type(step).__name__,
)
def test_a_step_alone_is_a_list_with_this_step(step):
    alone, listed = tiny(), tiny()
    step(alone, batches())
    Steps([step])(listed, batches())
    expected = alone.state_dict()
    assert all(quantizer.calibrated for _, quantizer in quantizers(alone))
    assert all(torch.equal(value, expected[name]) for name, value in listed.state_dict().items())


def test_every_unit_sees_the_quantized_and_corrected_units_before_it():
    model, record = tiny(), Record()
    Steps([TensorSearch(), Ridge(), GPTQ(), record])(model, batches())
    assert_same(record.seen, chained(model))


def test_with_a_float_prefix_every_unit_sees_the_float_model():
    model, record = tiny(), Record()
    Steps([TensorSearch(), OutputSearch(rounds=1, levels=1), record], prefix="float")(model, batches())
    with switched_off(quantizer for _, quantizer in quantizers(model)):
        assert_same(record.seen, chained(model))


def test_a_float_prefix_is_that_of_the_weights_before_they_were_corrected():
    model, record = tiny("deit", *build_recipe("uniform", w_bits=2, a_bits=2)), Record()
    before = copy.deepcopy(model)
    Steps([TensorSearch(), GPTQ(alpha=0.0), record], prefix="float")(model, batches())
    with switched_off(quantizer for _, quantizer in quantizers(before)):
        assert_same(record.seen, chained(before))


def test_a_correction_with_a_float_prefix_sees_the_quantizer_of_its_layer():
    """The units before are float; the input of the layer itself is quantized, or there would be nothing to correct."""
    model = tiny()
    before = model.blocks[0].mlp.fc1.weight.clone()
    Steps([TensorSearch(), Ridge(damping=0.01)], prefix="float")(model, batches())
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before)
