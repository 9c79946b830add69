"""Which images a process sees, in which order: a function of (seed, pass, rank) and of no state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from qat.data.streams import rng_for
from qat.errors import QatError


def crop_passes(crop_epochs: int, crops: int) -> list[int]:
    """Crops per image in each pass over the images: as many passes of ``crops`` as fit, the rest with one crop each."""
    return [crops] * (crop_epochs // crops) + [1] * (crop_epochs % crops)


def batches_per_pass(images: int, batch_size: int, passes: Sequence[int], world_size: int = 1) -> list[int]:
    """Steps of each pass; ``batch_size`` counts crops per process and step."""
    share = math.ceil(images / world_size)  # images per process
    return [math.ceil(share / (batch_size // crops)) for crops in passes]


def shuffled(images: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
    """This rank's indices in one pass; the permutation is wrapped round until all ranks have equally many."""
    order = rng_for(seed, epoch, images).permutation(images)  # no image has the index `images`: a stream of its own
    return np.resize(order, math.ceil(images / world_size) * world_size)[rank::world_size]


def batches_done(resumed: Mapping[str, Any], epoch: int, now: Mapping[str, Any]) -> int:
    """Batches of pass ``epoch`` that a resumed run has behind it.

    Args:
        resumed: pass, its finished batches, and what their order depended on.
        epoch: the pass that begins.
        now: what the order depends on now; QatError when a pass that goes on would go on otherwise.
    """
    if epoch != resumed["epoch"] or not resumed["batches"]:
        return 0
    for name, value in now.items():
        if (then := resumed.get(name, value)) != value:
            raise QatError(
                f"data: {name} is {value}, but the checkpoint was taken in the middle of a pass with {then}: "
                "go on with that, or from a checkpoint of the end of a pass"
            )
    done: int = resumed["batches"]
    return done


class Batches(Sampler[list[int]]):
    """Cuts an order into batches and keeps the last, incomplete one.

    Args:
        order: indices of images.
        size: images per batch.
        done: batches of a resumed pass that are not given again; they still count in the length, as Lightning wants.
    """

    def __init__(self, order: npt.NDArray[np.int64], size: int, done: int = 0):
        self.order, self.size, self.done = order, size, done

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.done * self.size, len(self.order), self.size):
            yield self.order[start : start + self.size].tolist()
