"""Learning rate as a function of the optimiser step."""

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
