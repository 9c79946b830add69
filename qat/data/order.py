"""Which images a process sees, in which order: a function of (seed, pass, rank) and of no state.

A pass visits every image once and makes a fixed number of crops of each. It is one epoch of the Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from qat.data.listing import LIST, LIST_WAY_OUT
from qat.data.streams import rng_for
from qat.errors import QatError


def crop_passes(crop_epochs: int, crops: int) -> list[int]:
    """Crops per image in each pass: as many passes of ``crops`` as fit, then passes of one crop for the rest."""
    return [crops] * (crop_epochs // crops) + [1] * (crop_epochs % crops)


def longer_passes(crop_epochs: int, crops: int, made: Sequence[int]) -> list[int]:
    """Crops per image in each pass of a run that goes on: those that are made, then what is left of ``crop_epochs``.

    Args:
        crop_epochs: crops of each image in the whole run.
        crops: crops per image and pass from now on.
        made: crops per image in each pass that has begun.

    Raises:
        QatError: more crops are made than the run shall have.
    """
    if (left := crop_epochs - sum(made)) < 0:
        raise QatError(
            f"data.crop_epochs is {crop_epochs}, but the checkpoint is from a run that has made {sum(made)} crops of "
            f"every image: give at least {sum(made)}"
        )
    return [*made, *crop_passes(left, crops)]


def batches_per_pass(images: int, batch_size: int, passes: Sequence[int], world_size: int = 1) -> list[int]:
    """Batches that each process sees in each pass; ``batch_size`` counts crops per process."""
    share = math.ceil(images / world_size)  # images per process
    return [math.ceil(share / (batch_size // crops)) for crops in passes]


def shuffled(images: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
    """Indices of the images of this rank in one pass.

    The permutation starts again from its beginning until all ranks have equally many.
    """
    order = rng_for(seed, epoch, images).permutation(images)  # no image has the index `images`: a stream of its own
    return np.resize(order, math.ceil(images / world_size) * world_size)[rank::world_size]


def batches_done(resumed: Mapping[str, Any], epoch: int, now: Mapping[str, Any]) -> int:
    """Batches of pass ``epoch`` that were finished before the run was resumed.

    Nothing of a pass that was finished is left to do in another order, so it does not matter what has changed since.

    Args:
        resumed: state of the checkpoint: the pass, its finished batches, whether these are all, and everything that
            their order depended on.
        epoch: the pass that begins.
        now: everything that the order depends on in this run.

    Raises:
        QatError: the rest of the pass would have another order than the part that is finished.
    """
    if epoch != resumed["epoch"] or not resumed["batches"]:
        return 0
    if _is_finished(resumed):
        return batches_per_pass(now["images"], now["batch_size"], [now["crops"]], now["processes"])[0]
    for name, value in now.items():
        if (then := resumed.get(name, value)) != value:
            way_out = LIST_WAY_OUT if name == LIST else "resume with that value"
            raise QatError(
                f"data: {name} is {value}, but the checkpoint was written in the middle of a pass with {then}: "
                f"{way_out}, or from a checkpoint that was written at the end of a pass"
            )
    done: int = resumed["batches"]
    return done


def _is_finished(resumed: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was written at the end of a pass; older ones do not say so."""
    if "finished" in resumed:
        return bool(resumed["finished"])
    sizes = ("images", "batch_size", "crops", "processes")
    if not all(name in resumed for name in sizes):
        return False
    images, batch_size, crops, processes = (resumed[name] for name in sizes)
    return bool(resumed["batches"] >= batches_per_pass(images, batch_size, [crops], processes)[0])


class ResumableBatchSampler(Sampler[list[int]]):
    """Cuts an order of images into batches; the last one may be incomplete.

    Args:
        order: indices of images.
        size: images per batch.
        done: batches at the start that are skipped because they were finished before the run was resumed. They still
            count in the length, as Lightning expects.
    """

    def __init__(self, order: npt.NDArray[np.int64], size: int, done: int = 0):
        self.order, self.size, self.done = order, size, done

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.done * self.size, len(self.order), self.size):
            yield self.order[start : start + self.size].tolist()
