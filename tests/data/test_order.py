"""Passes, numbers of batches, shuffles and batches to resume from, by hand."""

from pathlib import Path

import pytest

from qat.data.listing import LIST, with_list
from qat.data.order import ResumableBatchSampler, batches_done, batches_per_pass, crop_passes, longer_passes, shuffled
from qat.data.source import Source, list_of
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


def test_a_list_of_images_that_has_changed_is_refused_in_the_middle_of_a_pass():
    source = Source(Path("train"), ["2/a.png", "10/a.png"], ["2", "10"])
    older = {"epoch": 1, "batches": 3}  # of a version that did not store the list, and sorted numbers as text
    for state in (older, older | {LIST: list_of(["2/b.png", "10/a.png"])}):
        with pytest.raises(QatError, match=r"list of images is '2/a.png' to '10/a.png', .*10 before 2; start from"):
            batches_done(with_list(state, source), 1, {LIST: source.listed})
    same = {"finished": False, LIST: source.listed}
    assert batches_done(with_list(older | same, source), 1, {LIST: source.listed}) == 3
    names = Source(Path("train"), ["ant/a.png", "bee/a.png"], ["ant", "bee"])
    assert batches_done(with_list(older, names), 1, {LIST: names.listed}) == 3


def test_a_finished_pass_may_have_had_other_batches():
    now = {"images": 7, "batch_size": 8, "crops": 1, "processes": 1, "seed": 1}
    then = {"epoch": 1, "batches": 4, "images": 8, "batch_size": 4, "crops": 2, "processes": 1, "seed": 0}
    assert batches_done(then | {"finished": True}, 1, now) == 1  # all of them
    assert batches_done(then, 1, now) == 1  # an older checkpoint, with all of its batches
    with pytest.raises(QatError, match="middle of a pass"):
        batches_done(then | {"batches": 3}, 1, now)
    with pytest.raises(QatError, match="middle of a pass"):
        batches_done(then | {"finished": False}, 1, now)


def test_a_longer_run_makes_every_crop_that_it_shall_have() -> None:
    assert longer_passes(8, 4, []) == [4, 4]
    assert longer_passes(8, 4, [4, 1, 1]) == [4, 1, 1, 1, 1]  # 6 crops at first, then 8
    assert longer_passes(200, 4, crop_passes(150, 4))[39:] == [4] * 12 + [1] * 2  # the crops that are left
    for done in range(5):  # a run that is only resumed keeps its passes
        assert longer_passes(11, 4, crop_passes(11, 4)[:done]) == crop_passes(11, 4)
    with pytest.raises(QatError, match="has made 6 crops of every image: give at least 6"):
        longer_passes(4, 4, [4, 1, 1])
