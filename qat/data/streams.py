"""Random streams: every random number of a run is a function of a few integers, never of what was drawn before.

Neither the number of workers nor a resumed run therefore changes a crop, an order or a dropped path.
"""

from __future__ import annotations

import numpy as np
from numpy.random import PCG64, Generator

WORD = 2**32  # NumPy seeds a stream with 32-bit words and splits larger integers into several


def rng_for(seed: int, epoch: int, index: int) -> Generator:
    """The stream that belongs to three non-negative integers, for example to one visit to one image.

    It is that of ``np.random.default_rng([seed, epoch, index])``; NumPy only reads an array faster than a list.
    """
    if 0 <= seed | epoch | index < WORD:
        return Generator(PCG64(np.array((seed, epoch, index), np.uint32)))
    return np.random.default_rng([seed, epoch, index])
