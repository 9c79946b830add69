"""Schedules of learning rates, loss weights and thresholds."""

from __future__ import annotations

from math import cos, pi


def cosine_with_warmup(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Factor on the base rate at ``step`` of ``total``: linear up to 1 in ``warmup`` steps, then a cosine to ``floor``.

    The first step of a warm-up is already above zero, and no step before ``total`` runs at the floor.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + cos(pi * done))


def cosine_ramp(progress: float, start: float = 0.25) -> float:
    """Factor on a loss weight (VVTQ): 0 up to ``start``, then a half cosine that rises to 1.

    ``progress`` and ``start`` are shares of the training steps, 0 to 1.
    """
    if progress <= start:
        return 0.0
    return 0.5 * (1 - cos(pi * (min(progress, 1.0) - start) / (1 - start)))


def cosine_between(progress: float, first: float, last: float) -> float:
    """From ``first`` at progress 0 to ``last`` at progress 1, along a half cosine."""
    return last + (first - last) * 0.5 * (1 + cos(pi * min(max(progress, 0.0), 1.0)))
