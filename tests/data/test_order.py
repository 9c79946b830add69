"""Passes, numbers of batches, shuffles and batches to resume from, by hand."""

import pytest

from qat.data.order import ResumableBatchSampler, batches_done, batches_per_pass, crop_passes, shuffled
from qat.errors import QatError


def test_passes_spend_the_crop_epochs():
    assert crop_passes(150, 4) == [4] * 37 + [1] * 2
    assert crop_passes(3, 4) == [1] * 3
    assert crop_passes(8, 4) == [4, 4]
    assert crop_passes(2, 1) == [1, 1]


def test_steps_of_the_published_runs():
    passes = crop_passes(150, 4)
    assert sum(batches_per_pass(1_281_167, 1024, passes)) == 37 * 5005 + 2 * 1252 == 187_689
    assert sum(batches_per_pass(1_281_167, 512, passes, world_size=2)) == 37 * 5005 + 2 * 1252


def test_order_depends_on_seed_and_epoch_only():
    assert (shuffled(50, 1, 2) == shuffled(50, 1, 2)).all()
    assert (shuffled(50, 1, 2) != shuffled(50, 1, 3)).any()
    assert (shuffled(50, 1, 2) != shuffled(50, 2, 2)).any()
    assert shuffled(2, 0, 0, rank=4, world_size=5).shape == (1,)  # more ranks than images


def test_the_last_batch_may_be_incomplete_and_finished_batches_are_skipped():
    order = shuffled(7, 0, 0)
    assert [len(batch) for batch in ResumableBatchSampler(order, 3)] == [3, 3, 1]
    assert list(ResumableBatchSampler(order, 3, done=2)) == [[order[6]]]
    assert len(ResumableBatchSampler(order, 3, done=2)) == 3  # Lightning counts the batches before the resume itself


def test_a_pass_is_resumed_only_in_the_order_that_it_began_with():
    resumed = {"epoch": 1, "batches": 3, "batch_size": 4}
    assert batches_done(resumed, 1, {"batch_size": 4, "added later": 0}) == 3
    assert batches_done(resumed, 2, {"batch_size": 8}) == 0
    with pytest.raises(QatError, match=r"batch_size is 8, but the checkpoint was written in the middle .* with 4"):
        batches_done(resumed, 1, {"batch_size": 8})


def test_a_finished_pass_may_have_had_other_batches():
    now = {"images": 7, "batch_size": 8, "crops": 1, "processes": 1, "seed": 1}
    then = {"epoch": 1, "batches": 4, "images": 8, "batch_size": 4, "crops": 2, "processes": 1, "seed": 0}
    assert batches_done(then | {"finished": True}, 1, now) == 1  # all of them
    assert batches_done(then, 1, now) == 1  # an older checkpoint, with all of its batches
    with pytest.raises(QatError, match="middle of a pass"):
        batches_done(then | {"batches": 3}, 1, now)
    with pytest.raises(QatError, match="middle of a pass"):
        batches_done(then | {"finished": False}, 1, now)
