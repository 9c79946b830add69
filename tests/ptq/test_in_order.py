"""Calibration in the order of the network, also where a unit visits a site twice."""

import torch
from torch import Tensor, nn

from qat.ptq import InitSteps
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work
from qat.quantizers import LSQ
from qat.recipe import Rule
from qat.sites.family import Unit
from qat.sites.insert import SiteBuilder


class Twice(nn.Module):
    """x -> q(r(q(r(x)) + 10)) for sites r, "first", and q, "second", each visited twice."""

    def __init__(self) -> None:
        super().__init__()
        site = SiteBuilder([Rule("*", LSQ(8))])
        self.first, self.second = site.activation("first"), site.activation("second")
        self.elsewhere = site.activation("elsewhere")

    def forward(self, x: Tensor) -> Tensor:
        for more in (10, 0):
            x = self.second(self.first(x)) + more
        return x


def work_on(model: Twice, inputs: list[float]) -> UnitWork:
    tensors = [torch.tensor([[x]]) for x in inputs]
    return UnitWork(Work.of(model, InitSteps()), Unit("both", model), tensors, None, [], "quantized")


def test_a_site_that_is_visited_twice_is_calibrated_on_both_tensors():
    model, seen = Twice(), []
    here = work_on(model, [1, 5])
    assert list(here.wanted_activations()) == ["first", "second"], "the order of the network"
    for quantizer, values in here.in_order(here.wanted_activations()):
        seen.append(values.flatten().tolist())
        quantizer.step.data.fill_(2.0 if quantizer is model.first else 8.0)
    # first: of each batch, the input, and what the sites make of it, with both off, plus 10
    assert seen[0] == [1, 11, 5, 15]
    # second: 1 -> 0 (a half rounds to even), 10 -> 10; 5 -> 4 (2.5 rounds to 2), 14 -> 14
    assert seen[1] == [0, 10, 4, 14]
    # both on: 1 -> 0 -> 0, 10 -> 10 -> 8 (1.25 rounds to 1); the input of 5: 4 -> 0 (0.5 rounds to 0), 10 -> 8
    assert model(torch.tensor([[1.0], [5.0]])).flatten().tolist() == [8, 8]


def test_other_sites_stay_as_they_are_and_none_is_needed():
    """A rewrite has filled the first site; the second sees what it makes of its input."""
    model = Twice()
    model.first.set_range_(torch.tensor([0.0]), torch.tensor([254.0]))  # steps of 2
    here = work_on(model, [5])
    ((quantizer, values),) = here.in_order({"second": model.second})
    assert quantizer is model.second
    assert values.flatten().tolist() == [4, 14]
    assert list(here.in_order({})) == []
