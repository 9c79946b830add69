"""Training images that are put aside: nothing is trained or calibrated on them, so that a run can be judged by them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qat.data.streams import rng_for
from qat.errors import QatError

STREAM = 2**31  # another one than those of crops and calibrations, for any seed
Indices = npt.NDArray[np.int64]


class Parts(NamedTuple):
    """Indices of training images, each in order."""

    used: Indices
    held_out: Indices


def put_aside(total: int, count: int) -> Parts:
    """Some images are held out.

    The choice depends on the two numbers alone: a calibration and the training that follows it spare the same images.

    Args:
        total: training images.
        count: how many are put aside.

    Raises:
        QatError: none would be left.
    """
    if count and count >= total:
        raise QatError(f"data.held_out is {count}, and there are {total} training images: leave some to learn from")
    order = rng_for(0, 0, STREAM).permutation(total)
    return Parts(np.sort(order[count:]), np.sort(order[:count]))
