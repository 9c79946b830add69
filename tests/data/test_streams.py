"""Random streams are NumPy's own, whatever the size of the integers."""

import numpy as np
import pytest

from qat.data.streams import rng_for

SIZES = (0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**70 + 3)  # on both sides of a 32-bit word


def test_a_stream_is_that_of_numpys_list_of_integers():
    for seed in SIZES:
        for epoch in SIZES:
            for index in SIZES:
                ours, theirs = rng_for(seed, epoch, index), np.random.default_rng([seed, epoch, index])
                assert ours.bit_generator.state == theirs.bit_generator.state, (seed, epoch, index)


def test_negative_integers_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        rng_for(0, -1, 0)
