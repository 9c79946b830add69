"""The base class of regularizers: losses on quantized weights."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, cast

from torch import Tensor, nn

from qat.errors import QatError
from qat.quantizers import LSQQuantizer
from qat.ranges import Range, checked
from qat.sites.insert import WeightSite, weight_sites
from qat.training.schedules import cosine_ramp

PenaltyWeight = Annotated[float, Range(above=0, high=1e30)]
Start = Annotated[float, Range(0, below=1)]
Widest = Annotated[int, Range(2, 16)]
LOW_BITS = 7  # the widest weight that counts as low-bit; 8 bits are for layers that quantization should not disturb


class Regularizer(ABC):
    """A loss on chosen quantized weights, with a weight that rises along a cosine.

    Args:
        weight: weight of this loss when training ends; it rises to it along a cosine.
        start: share of training, 0 to 1, before the weight rises from zero; nothing is computed until then.
        sites: glob over the names of weight sites.
        max_bits: widest weight that is regularized; the default leaves out the 8-bit first and last layer.
    """

    @checked
    def __init__(
        self,
        weight: PenaltyWeight = 0.01,
        start: Start = 0.25,
        sites: str = "*.weight_quant",
        max_bits: Widest = LOW_BITS,
    ) -> None:
        self.weight, self.start, self.sites, self.max_bits = weight, start, sites, max_bits

    @property
    def name(self) -> str:
        """The name of the class in snake case, under which the loss is logged."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def weight_at(self, progress: float) -> float:
        """Weight of the loss when the share ``progress`` of training is done, 0 to 1."""
        return self.weight * cosine_ramp(progress, self.start)

    def choose(self, model: nn.Module) -> list[WeightSite]:
        """The weights that are regularized; QatError when there are none, or when one has no even grid."""
        found = weight_sites(model, self.sites, self.max_bits)
        for site in found:
            grid_of(site)
        return found

    def __call__(self, model: nn.Module) -> Tensor:
        """The sum over the chosen weights, without the factor `weight_at`."""
        return self.penalty(self.choose(model))

    @abstractmethod
    def penalty(self, sites: Sequence[WeightSite]) -> Tensor:
        """The sum over these weights, a scalar."""


def named(regularizers: Sequence[Regularizer]) -> dict[str, Regularizer]:
    """The regularizers by name; a second one of the same class gets a number."""
    found: dict[str, Regularizer] = {}
    for regularizer in regularizers:
        same = sum(type(other) is type(regularizer) for other in found.values())
        found[f"{regularizer.name}_{same + 1}" if same else regularizer.name] = regularizer
    return found


def grid_of(site: WeightSite) -> LSQQuantizer:
    """The evenly spaced grid of a weight; QatError when its quantizer has none."""
    if not site.quantizer.even_grid:
        raise QatError(f"{site.name} is a {type(site.quantizer).__name__}: only weights of LSQ are regularized")
    return cast(LSQQuantizer, site.quantizer)
