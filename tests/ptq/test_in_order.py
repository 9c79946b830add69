"""Calibration in the order of the network, also where a unit visits a site twice."""

import torch
from torch import Tensor, nn

from qat.ptq.in_order import calibrate_in_order
from qat.quantizers import LSQ, Quantizer
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


def test_a_site_that_is_visited_twice_is_calibrated_on_both_tensors():
    model = Twice()
    seen: dict[str, list[float]] = {}

    def calibrate_site(name: str, quantizer: Quantizer, samples: Tensor) -> None:
        seen[name] = samples.flatten().tolist()
        quantizer.step.data.fill_(2.0 if name == "first" else 8.0)

    tensors, sites = [torch.tensor([[1.0]]), torch.tensor([[5.0]])], {"second": model.second, "first": model.first}
    calibrate_in_order(Unit("both", model), tensors, sites, calibrate_site)
    assert list(seen) == ["first", "second"], "the order of the network"
    # first: of each batch, the input, and what the sites make of it, with both off, plus 10
    assert seen["first"] == [1, 11, 5, 15]
    # second: 1 -> 0 (a half rounds to even), 10 -> 10; 5 -> 4 (2.5 rounds to 2), 14 -> 14
    assert seen["second"] == [0, 10, 4, 14]
    # both on: 1 -> 0 -> 0, 10 -> 10 -> 8 (1.25 rounds to 1); the input of 5: 4 -> 0 (0.5 rounds to 0), 10 -> 8
    assert model(torch.tensor([[1.0], [5.0]])).flatten().tolist() == [8, 8]


def test_other_sites_stay_as_they_are_and_none_is_needed():
    """A rewrite has filled the first site; the second sees what it makes of its input."""
    model, seen = Twice(), []
    model.first.set_range_(torch.tensor([0.0]), torch.tensor([254.0]))  # steps of 2

    def calibrate_site(name: str, quantizer: Quantizer, samples: Tensor) -> None:
        seen.append((name, samples.flatten().tolist()))

    calibrate_in_order(Unit("both", model), [torch.tensor([[5.0]])], {"second": model.second}, calibrate_site)
    assert seen == [("second", [4, 14])]
    calibrate_in_order(Unit("both", model), [], {}, calibrate_site)  # without sites no unit is run
