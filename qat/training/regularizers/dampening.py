"""Oscillation dampening (Nagel et al. 2022, Eq. 6): pulls latent weights to the centre of their bin.

L = sum_i (value_i - clip(w_i))^2, with w_i clipped to the range of the grid, and its quantized value_i as a constant
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qat.ranges import checked
from qat.sites.insert import WeightSite
from qat.training.regularizers.base import LOW_BITS, PenaltyWeight, Regularizer, Start, Widest, grid_of

Reduction = Literal["sum", "mean", "channel"]


class Dampening(Regularizer):
    """Squared distance of each weight from its quantized value; clipped weights get no gradient.

    Args:
        weight: weight of this loss when training ends; Nagel et al. have 0.1 for MobileNetV2.
        start: share of training, 0 to 1, before the weight rises from zero; nothing is computed until then.
        reduction: over the values of a weight: sum, mean, or channel (sum over output channels, mean over the rest,
            the released form of Nagel et al.).
        sites: glob over the names of weight sites.
        max_bits: widest weight that is regularized.
    """

    @checked
    def __init__(
        self,
        weight: PenaltyWeight = 0.1,
        start: Start = 0.25,
        reduction: Reduction = "channel",
        sites: str = "*.weight_quant",
        max_bits: Widest = LOW_BITS,
    ) -> None:
        super().__init__(weight, start, sites, max_bits)
        self.reduction = reduction

    def penalty(self, sites: Sequence[WeightSite]) -> Tensor:
        """The squared distances of these weights, reduced."""
        return torch.stack([self._one(site) for site in sites]).sum()

    def _one(self, site: WeightSite) -> Tensor:
        weight, quantizer = site.weight, grid_of(site)
        with torch.no_grad():
            v = quantizer.scaled(weight)
            inside = (v >= quantizer.qmin) & (v <= quantizer.qmax)
            values = torch.where(inside, quantizer(weight), weight)  # outside, distance and gradient are zero
        total = (values - weight).square().sum()
        count = {"sum": 1, "mean": weight.numel(), "channel": weight.numel() / weight.shape[0]}[self.reduction]
        return total / count
