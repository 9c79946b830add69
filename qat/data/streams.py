"""Random streams: every random number of a run is a function of a few integers, never of what was drawn before.

Neither the number of workers nor a resumed run therefore changes a crop, an order or a dropped path.
"""

from __future__ import annotations

import numpy as np


def rng_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream that belongs to these three non-negative integers, for example one visit to one image."""
    return np.random.default_rng([seed, epoch, index])
