"""Calibration in the order of the network, also where a unit visits a site twice."""

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.in_order import calibrate_in_order
from qat.quantizers import LSQ, Quantizer
from qat.recipe import Rule
from qat.sites import family as families
from qat.sites.family import Family, Unit
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


class Chain(Family):
    def check(self, model: Twice) -> None:
        pass

    def units(self, model: Twice) -> list[Unit]:
        return [Unit("both", model, ("first", "second"))]


@pytest.fixture
def model(monkeypatch) -> Twice:
    monkeypatch.setitem(families.FAMILIES, Twice, Chain())
    return Twice()


def test_a_site_that_is_visited_twice_is_calibrated_on_both_tensors(model):
    seen: dict[str, list[float]] = {}

    def calibrate_site(name: str, quantizer: Quantizer, samples: Tensor) -> None:
        seen[name] = samples.flatten().tolist()
        quantizer.step.data.fill_(2.0 if name == "first" else 8.0)

    calibrate_in_order(model, [torch.tensor([[1.0]]), torch.tensor([[5.0]])], calibrate_site, ["second", "first"])
    assert list(seen) == ["first", "second"], "the order of the network"
    # first: of each batch, the input, and what the sites make of it, with both off, plus 10
    assert seen["first"] == [1, 11, 5, 15]
    # second: 1 -> 0 (a half rounds to even), 10 -> 10; 5 -> 4 (2.5 rounds to 2), 14 -> 14
    assert seen["second"] == [0, 10, 4, 14]
    # both on: 1 -> 0 -> 0, 10 -> 10 -> 8 (1.25 rounds to 1); the input of 5: 4 -> 0 (0.5 rounds to 0), 10 -> 8
    assert model(torch.tensor([[1.0], [5.0]])).flatten().tolist() == [8, 8]


def test_a_site_that_no_unit_reaches_is_named(model):
    with pytest.raises(QatError, match=r"no calibration image reached 'elsewhere', or its model does not say"):
        calibrate_in_order(model, [torch.ones(1, 1)], lambda *_: None, ["elsewhere"])
