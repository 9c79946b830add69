"""How the crops of one optimizer step are spread over processes and over accumulated forward passes."""

from __future__ import annotations

from qat.errors import QatError

DEFAULT_BATCH_SIZE = 256  # crops per process and forward pass


def split_global_batch(
    global_batch_size: int | None,
    batch_size: int | None,
    processes: int,
    accumulate: int | None,
    crops_per_image: int = 1,
) -> tuple[int, int]:
    """Return the crops per process and forward pass, and the forward passes per optimizer step.

    They satisfy ``global_batch_size == processes * accumulate * batch_size`` where that is given.

    Args:
        global_batch_size: crops per optimizer step over all processes; None for whatever the others give.
        batch_size: crops per process and forward pass; None computes it.
        processes: training processes, one per device.
        accumulate: forward passes per optimizer step. Where ``batch_size`` is given, None and 1 (the Trainer's default)
            compute it; where it is not, None means 1.
        crops_per_image: crops of an image stay together, so ``batch_size`` is a multiple of it.

    Raises:
        QatError: no such split exists.
    """
    if global_batch_size is None:
        return DEFAULT_BATCH_SIZE if batch_size is None else batch_size, accumulate or 1
    if batch_size is None:
        passes = accumulate or 1
        crops = global_batch_size // (processes * passes)
    else:
        crops = batch_size
        passes = accumulate if accumulate not in (None, 1) else global_batch_size // (processes * crops)
    if passes < 1 or crops < 1 or processes * passes * crops != global_batch_size or crops % crops_per_image:
        given = f", data.batch_size {batch_size}" if batch_size is not None else ""
        given += f", trainer.accumulate_grad_batches {accumulate}" if accumulate not in (None, 1) else ""
        raise QatError(
            f"data.global_batch_size is {global_batch_size}, which cannot be split over the {processes} "
            f"process{'es' if processes > 1 else ''} of this run{given}: it must be processes x batch_size x "
            f"accumulate_grad_batches, where batch_size is a multiple of crops_per_image {crops_per_image}; choose "
            "another number of trainer.devices, data.batch_size or trainer.accumulate_grad_batches"
        )
    return crops, passes
