"""Dampening: distance to the bin centre, inside the range only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qat.errors import QatError
from qat.quantizers import LSQ, LSQQuantizer, Uniform
from qat.quantizers.spec import Layout
from qat.sites.insert import WeightSite
from qat.training.regularizers import Dampening


def site() -> WeightSite:
    """Section 9.7 of the specification at 2 bits: 0.55 is clipped (v = 2.75 > 1), -0.52 too (v = -2.6 < -2)."""
    quantizer = LSQQuantizer(LSQ(bits=2), Layout(0, 1, batched=False))
    nn.init.constant_(quantizer.step, 0.2)
    weight = [[-0.52, -0.27, -0.06, 0.03], [0.12, 0.24, 0.31, 0.55], [-0.21, 0.08, -0.33, 0.19]]
    return WeightSite("fc.weight_quant", nn.Parameter(torch.tensor(weight)), quantizer)


@pytest.mark.parametrize(("reduction", "count"), [("sum", 1), ("mean", 12), ("channel", 4)])
def test_value_and_gradient(reduction: str, count: int) -> None:
    chosen = site()
    penalty = Dampening(reduction=reduction).penalty([chosen])
    penalty.backward()
    # distances, 0 where clipped (0.24 and 0.31 are above 0.2, the largest value): squares sum to 0.0273, as printed
    distance = [[0, -0.07, -0.06, 0.03], [-0.08, 0, 0, 0], [-0.01, 0.08, 0.07, -0.01]]
    assert penalty.item() == pytest.approx(0.0273 / count, rel=1e-5)  # float32
    assert torch.allclose(chosen.weight.grad, 2 * torch.tensor(distance) / count, atol=1e-7)
    assert chosen.quantizer.step.grad is None


def test_other_grids_are_refused() -> None:
    chosen = site()._replace(quantizer=Uniform(4).build(Layout(0, 1, batched=False)))
    with pytest.raises(QatError, match=r"fc\.weight_quant is a UniformQuantizer"):
        Dampening().penalty([chosen])
