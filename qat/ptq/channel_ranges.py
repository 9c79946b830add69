"""Ratios and shifts that bring the channels of an activation to one range, and how far to go with them.

A channel with step s and zero point z gets the ratio r = (s / s~)^p and a shift that puts the middle of its range on
that of the common one. With the strength p = 1, all channels then have one range, and the weights that undo the ratios
have all of their differences (RepQ-ViT, equations 5 to 8); with p = 0 only the middles move. The best strength often
lies between: a weight whose columns differ is rounded worse. Shapes: C channels, n rows, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.ptq.tensor_search import fit
from qat.quantizers import Quantizer, UniformQuantizer

NARROWEST = 0.001  # as a part of the mean; with a tenth, channels that are only narrow lost their place
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


class Rewrite(NamedTuple):
    """An activation y that becomes (y + shift) / ratio; both (C,), float64."""

    ratio: Tensor
    shift: Tensor


def to_common_range(channels: UniformQuantizer, step: Tensor, zero: Tensor, strength: float) -> Rewrite:
    """The rewrite that takes channels towards a common step and zero point.

    Args:
        channels: a step and a zero point for each channel (C,).
        step, zero: the common ones.
        strength: p, 0 to 1.
    """
    own_step, own_zero = channels.step.detach().double(), channels.zero_point.double()
    if strength == 1:  # with whole zero points, the codes stay what they are, bit for bit
        return Rewrite(own_step / step, own_step * (own_zero - zero))
    ratio, middle = (own_step / step) ** strength, (channels.spec.qmin + channels.spec.qmax) / 2
    return Rewrite(ratio, ratio * (middle - zero) * step - (middle - own_zero) * own_step)


@torch.no_grad()
def fit_channels(channels: UniformQuantizer, rows: Tensor) -> None:
    """Give every channel the range of the least squared error of its rows (C, n), but no almost constant one its own.

    The ratio of a channel that is far narrower than the others would multiply a weight that then has no code, and the
    error of that weight would reach all outputs; it gets the range of `NARROWEST` of the mean around its middle.
    """
    fit(channels, rows, levels=1)
    step, zero = channels.step.detach().clone(), channels.zero_point.clone()
    least, middle = step.clamp(min=NARROWEST * float(step.mean())), (channels.spec.qmin + channels.spec.qmax) / 2
    channels.set_({"step": least, "zero_point": (middle - (middle - zero) * step / least).round()})


@torch.no_grad()
def best_strength(
    channels: UniformQuantizer, step: Tensor, zero: Tensor, rows: Tensor, site: Quantizer, layers: Sequence[Any]
) -> float:
    """The strength with the least error of the outputs of the layers that read the activation.

    Input and weights are quantized, each by the range of the least squared error of its own tensor.

    Args:
        channels, step, zero: as in `to_common_range`.
        rows: of the activation (n, C).
        site: quantizes it, with a single step.
        layers: linear layers that read it, with ``weight`` (O, C) and ``weight_quant``.
    """
    errors = {}
    for strength in STRENGTHS:
        ratio, shift = (x.float() for x in to_common_range(channels, step, zero, strength))
        x = (rows + shift) / ratio
        read = _quantized(site, x)
        errors[strength] = 0.0
        for layer in layers:
            weight = layer.weight.detach().float() * ratio
            D = read @ _quantized(layer.weight_quant, weight).T - x @ weight.T
            errors[strength] += float(D.square().mean())
    return min(errors, key=lambda strength: errors[strength])


def _quantized(site: Any, x: Tensor) -> Tensor:
    """A tensor as a quantizer of this kind makes it, with its own best range; itself at a site in floating point."""
    if not isinstance(site, Quantizer):
        return x
    trial: Quantizer = site.spec.build(site.layout).to(x.device)
    fit(trial, trial.grouped(x), levels=0)
    found: Tensor = trial(x)
    return found
