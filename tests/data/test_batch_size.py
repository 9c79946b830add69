"""The global batch over 1, 2 and 8 processes, with and without accumulation, by hand."""

import pytest

from qat.data.batch_size import split_global_batch
from qat.errors import QatError


@pytest.mark.parametrize(
    ("batch_size", "processes", "accumulate", "expected"),
    [
        (None, 1, None, (1024, 1)),
        (None, 2, 1, (512, 1)),
        (None, 8, None, (128, 1)),
        (None, 1, 4, (256, 4)),
        (None, 8, 2, (64, 2)),
        (256, 1, None, (256, 4)),
        (256, 2, 1, (256, 2)),
        (128, 8, None, (128, 1)),
        (32, 8, 4, (32, 4)),
    ],
)
def test_a_global_batch_of_1024_crops(batch_size, processes, accumulate, expected):
    size, passes = split_global_batch(1024, batch_size, processes, accumulate, crops_per_image=4)
    assert (size, passes) == expected
    assert processes * size * passes == 1024


@pytest.mark.parametrize(
    ("batch_size", "processes", "accumulate", "words"),
    [
        (None, 3, None, "1024, which cannot be split over the 3 processes of this run: "),
        (None, 1, 3, "the 1 process of this run, trainer.accumulate_grad_batches 3: "),
        (None, 512, None, "the 512 processes of this run: .* a multiple of crops_per_image 4"),  # 2 crops each
        (None, 2048, None, "the 2048 processes"),
        (96, 2, None, "the 2 processes of this run, data.batch_size 96: "),
        (1024, 2, None, "data.batch_size 1024: "),
        (128, 2, 2, "data.batch_size 128, trainer.accumulate_grad_batches 2: "),
    ],
)
def test_a_global_batch_that_cannot_be_split_is_refused_with_the_ways_out(batch_size, processes, accumulate, words):
    with pytest.raises(QatError, match=f"data.global_batch_size is .*{words}") as caught:
        split_global_batch(1024, batch_size, processes, accumulate, crops_per_image=4)
    for option in ("trainer.devices", "data.batch_size", "trainer.accumulate_grad_batches"):
        assert option in str(caught.value)
