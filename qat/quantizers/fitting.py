"""First values of a step and an offset, from samples. Shapes: G groups that share a step, n values in a group.

Each method maps (samples (G, n), spec, activation or weight) to (step (G,), offset (G,)); the offset is zero where the
spec has none. Ranges that are empty (an all-zero channel) give a zero step, which the caller clamps.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

ALTERNATIONS = 300  # a Gaussian tensor needs 20 to 900; every one lowers the error, so stopping early is safe
TOLERANCE = 1e-5
CANDIDATES = 100


class UniformSpec(Protocol):
    """What fitting needs to know of a spec."""

    @property
    def qmin(self) -> int:
        """The smallest code."""

    @property
    def qmax(self) -> int:
        """The largest code."""

    @property
    def width(self) -> int:
        """Bits."""

    @property
    def signed(self) -> bool:
        """Codes below zero exist."""

    @property
    def offset(self) -> bool:
        """An offset is fitted too."""

    @property
    def init(self) -> str:
        """Name of the method."""

    @property
    def percentile(self) -> float:
        """In percent."""


Fit = tuple[Tensor, Tensor]


def fit(samples: Tensor, spec: UniformSpec, batched: bool) -> Fit:
    """Step and offset (G,) by the method that the spec names; ``batched`` tells activations from weights."""
    return METHODS[spec.init](samples, spec, batched)


def mse(samples: Tensor, spec: UniformSpec, batched: bool) -> Fit:
    """Least squared error: from the full range for weights, from the best of many clipped ranges for activations."""
    if not batched and not spec.offset:
        step = samples.abs().amax(1) / spec.qmax
        return alternate(samples, step, torch.zeros_like(step), spec)
    return alternate(samples, *best_range(samples, spec), spec)


def alternate(x: Tensor, step: Tensor, offset: Tensor, spec: UniformSpec) -> Fit:
    """Codes for fixed (step, offset), then least squares of x on the codes, until the step stands still (spec 2.6)."""
    for _ in range(ALTERNATIONS):
        codes = _codes(x, step, offset, spec)
        if spec.offset:
            mean_x, mean_c = x.mean(1), codes.mean(1)
            centred = codes - mean_c[:, None]
            new = (x * centred).sum(1) / centred.square().sum(1)
        else:
            new = (x * codes).sum(1) / codes.square().sum(1)
        new = torch.where(new > 0, new, step)  # 0/0 for a constant group, and a step is never negative
        if spec.offset:
            offset = mean_x - new * mean_c
        moved = ((new - step).abs() > TOLERANCE * new).any()
        step = new
        if not moved:
            break
    return step, offset


def from_range(low: Tensor, high: Tensor, spec: UniformSpec) -> Fit:
    """The smallest step (G,), and the offset, whose grid spans low..high."""
    step = (high - low) / (spec.qmax - spec.qmin) if spec.offset else _full_step(low, high, spec)
    return step, _offset_from(low, step, spec)


def best_range(x: Tensor, spec: UniformSpec) -> Fit:
    """The clipped range, among `CANDIDATES` of them, with the least squared error."""
    low, high = x.amin(1), x.amax(1)
    full, _ = from_range(low, high, spec)
    best, best_error = full, torch.full_like(full, torch.inf)
    for shrink in torch.linspace(1, 1 / CANDIDATES, CANDIDATES).tolist():
        step = full * shrink
        offset = _offset_from(low, step, spec)
        values = _codes(x, step, offset, spec) * step[:, None] + offset[:, None]
        error = (values - x).square().mean(1)
        best, best_error = torch.where(error < best_error, step, best), torch.minimum(error, best_error)
    return best, _offset_from(low, best, spec)


def lsq(samples: Tensor, spec: UniformSpec, batched: bool) -> Fit:
    """2 mean|x| / sqrt(qmax) (LSQ), with the bound that the quantizer really has, signed or not."""
    step = 2 * samples.abs().mean(1) / sqrt(spec.qmax)
    return step, torch.zeros_like(step)


def lsq_plus(samples: Tensor, spec: UniformSpec, batched: bool) -> Fit:
    """Weights: the larger end of mean +- 3 deviations over 2**(bits-1). Activations: joint fit of step and offset."""
    if batched:
        return mse(samples, spec, batched)
    mean, deviation = samples.mean(1), samples.std(1, correction=min(1, samples.shape[1] - 1))
    step = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 2 ** (spec.width - 1)
    return step, torch.zeros_like(step)


def percentile(samples: Tensor, spec: UniformSpec, batched: bool) -> Fit:
    """The range holds ``spec.percentile`` percent of the values; with an offset, each tail loses half of the rest."""
    if spec.offset:
        tail = (100 - spec.percentile) / 200
        low, high = _quantile(samples, tail), _quantile(samples, 1 - tail)
        step = (high - low) / (spec.qmax - spec.qmin)
        return step, _offset_from(low, step, spec)
    reached = samples.abs() if spec.qmin < 0 else samples  # an unsigned grid without offset ends at zero
    step = _quantile(reached, spec.percentile / 100).clamp(min=0) / spec.qmax
    return step, torch.zeros_like(step)


METHODS: dict[str, Callable[[Tensor, UniformSpec, bool], Fit]] = {
    "mse": mse,
    "lsq": lsq,
    "lsq_plus": lsq_plus,
    "percentile": percentile,
}


def _codes(x: Tensor, step: Tensor, offset: Tensor, spec: UniformSpec) -> Tensor:
    safe = torch.where(step > 0, step, 1)[:, None]
    return ((x - offset[:, None]) / safe).clamp_(spec.qmin, spec.qmax).round_()


def _offset_from(low: Tensor, step: Tensor, spec: UniformSpec) -> Tensor:
    """The offset that puts the lowest code on ``low``; zero where the spec has none."""
    return low - spec.qmin * step if spec.offset else torch.zeros_like(low)


def _full_step(low: Tensor, high: Tensor, spec: UniformSpec) -> Tensor:
    """The smallest step whose grid reaches both ends of the data; an unsigned grid cannot reach below zero."""
    up = high.clamp(min=0) / spec.qmax
    return torch.maximum(up, low / spec.qmin) if spec.qmin < 0 else up


def _quantile(x: Tensor, share: float) -> Tensor:
    """Quantile of each row (G, n); `torch.quantile` refuses more than 16 million values."""
    k = min(max(round(share * (x.shape[1] - 1)) + 1, 1), x.shape[1])
    return x.kthvalue(k, dim=1).values
