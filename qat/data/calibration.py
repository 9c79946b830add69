"""The images of a calibration: a random subset, in batches."""

from __future__ import annotations

from typing import Annotated

from qat.data.images import Images, Loader, load
from qat.data.order import ResumableBatchSampler
from qat.data.streams import rng_for
from qat.errors import QatError
from qat.ranges import Range, Seed, checked


@checked
def calibration_loader(
    source: Images, images: Annotated[int, Range(1)], batch_size: Annotated[int, Range(1)], seed: Seed, workers: int
) -> Loader:
    """Batches of a random subset of images.

    Args:
        source: what there is to choose from.
        images: size of the subset; which ones depends on the seed alone, so every rank gets the same.
        batch_size: images in a batch.
        seed: of the subset.
        workers: processes that decode.

    Raises:
        QatError: there are fewer images.
    """
    if images > (most := len(source)):
        held_out = len(source.source) - most
        but = f", and data.held_out takes {held_out} more" if held_out else ""
        raise QatError(f"calibration.images is {images}: {source.source.place} has {most}{but}, choose 1..{most}")
    chosen = rng_for(seed, 0, 0).permutation(most)[:images]
    return load(source, workers, batch_sampler=ResumableBatchSampler(chosen, batch_size))
