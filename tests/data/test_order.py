"""Passes, step totals and shuffles, by hand."""

from qat.data.order import Batches, batches_per_pass, crop_passes, shuffled


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


def test_batches_keep_the_rest_and_leave_out_what_is_done():
    order = shuffled(7, 0, 0)
    assert [len(batch) for batch in Batches(order, 3)] == [3, 3, 1]
    assert list(Batches(order, 3, done=2)) == [[order[6]]]
    assert len(Batches(order, 3, done=2)) == 3  # Lightning counts the batches before the resume itself
