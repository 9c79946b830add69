"""RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254): percentile ranges, and channel scales folded out of LayerNorms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from qat.errors import QatError
from qat.ptq.fold_norms import FoldNorms
from qat.ptq.search import PERCENTILES, calibrate_by_percentiles_
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Preset
from qat.ptq.unit_work import UnitWork
from qat.ranges import Range, check_fields
from qat.sites.insert import switched_off

EVERY_VALUE = 1_000_000_000


@dataclass
class Percentiles(Step):
    """Every site gets the percentile range with the least squared error; activations in the order of the network.

    Args:
        shares: quantiles that are tried as the upper end of a range; the lower end is the quantile 1 - share.
    """

    shares: Sequence[Annotated[float, Range(above=0.5, high=1)]] = PERCENTILES

    stage = Stage.INITIALIZE

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.shares:
            raise QatError("Percentiles: shares is empty: give quantiles above 0.5 and at most 1, such as 0.999")

    def unit(self, here: UnitWork) -> None:
        """Fill the sites of a unit, but for those that a rewrite has filled; each sees those before it quantized."""
        weights = here.wanted_weights()
        rest = {name: q for name, q in here.wanted_activations().items() if not q.calibrated}
        with switched_off(site.quantizer for site in weights):  # folded ones are coarser
            for quantizer, values in here.in_order(rest):
                calibrate_by_percentiles_(quantizer, values, self.shares)
        for _, weight, quantizer in weights:
            calibrate_by_percentiles_(quantizer, quantizer.grouped(weight.detach().float()), self.shares)


@dataclass
class RepQViT(Preset):
    """Fills the recipes repq_vit and bitlog2_*: every site gets the percentile range with the least squared error.

    Args:
        shares: quantiles that are tried as the upper end of a range; the lower end is the quantile 1 - share.
    """

    shares: Sequence[Annotated[float, Range(above=0.5, high=1)]] = PERCENTILES

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.shares:
            raise QatError("RepQViT: shares is empty: give quantiles above 0.5 and at most 1, such as 0.999")

    def steps(self) -> Sequence[Step]:
        """Norms are folded before the weights behind them are calibrated."""
        return [FoldNorms(shares=self.shares, samples=EVERY_VALUE), Percentiles(self.shares)]
