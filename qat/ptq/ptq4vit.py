"""PTQ4ViT (Yuan et al., ECCV 2022, arXiv 2111.12293): steps that are chosen by squared gradients, without training.

Every unit is calibrated on what the float model gives to it. The two differences to the released code: gradients are
those of KL between the float model and one whose unit is quantized, because the float model compared with itself has a
gradient of rounding noise; and all candidates are compared on the samples with the largest gradients, then the best
eight on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qat.ptq.full_range import FullRange
from qat.ptq.hessian_search import HessianSearch, HessianSearchOptions
from qat.ptq.step import Step
from qat.ptq.steps import Preset, options_of
from qat.ptq.work import Prefix


@dataclass
class PTQ4ViT(HessianSearchOptions, Preset):
    """PTQ4ViT, for its recipes ptq4vit and ptq4vit_released, and for any other one.

    Args:
        prefix: what units see: the output of the units before them as ``float``, or as they are ``quantized``.
    """

    prefix: Prefix = "float"

    changes_weights = False

    def steps(self) -> Sequence[Step]:
        """The full range, then the search."""
        return [FullRange(), HessianSearch(**options_of(self, HessianSearchOptions))]
