"""PD-Quant (Liu et al., CVPR 2023, arXiv 2212.07048): the difference of predictions tells how good a unit is.

Shapes: B images of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from qat.ptq.qdrop import QDrop
from qat.ptq.reconstruction.losses import PerFirst, ReconstructionLoss, UnitLoss, divergence
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ranges import Range, check_fields


@dataclass
class PDQuant(QDrop):
    """`QDrop` whose loss looks at predictions too.

    Args:
        loss: what the output of a unit is compared by; null is Prediction.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss = self.loss or Prediction()


@dataclass
class Prediction(ReconstructionLoss):
    """The difference of the predictions, beside the squared error.

    Args:
        local: weight of the squared error.
    """

    local: Annotated[float, Range(low=0, high=1000)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, data: UnitData) -> UnitLoss:
        """Both over their first values."""
        one, two = PerFirst(), PerFirst()

        def loss(out: Tensor, picks: Tensor) -> Tensor:
            local = one((out - data.targets[picks]).square().mean())
            return two(divergence(data.rest(out), data.logits[picks])) + self.local * local

        return UnitLoss(loss, [one, two])
