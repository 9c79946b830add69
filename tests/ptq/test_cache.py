"""Where inputs and outputs of units are kept: the same bits, in memory or in a file, and what is said about it."""

import logging

import pytest
import torch
from torch import Tensor

from qat.ptq import Frontier, PTQMethod, QDrop
from qat.ptq.cache import Batches, Cache
from qat.recipe import build_recipe
from tests.ptq.test_output_search import batches, tiny

SIZES = [3, 2, 3]


def kept(cache: Cache) -> tuple[list[Tensor], Batches]:
    parts = [torch.randn(size, 4, 5) for size in SIZES]
    return parts, cache.keep(iter(parts), SIZES)


@pytest.mark.parametrize("full", [False, True])
def test_batches_and_rows_are_what_was_kept(full, tmp_path):
    parts, found = kept(Cache(1.0, tmp_path, full))
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(parts, found, strict=True))
    assert torch.equal(found[-1], parts[2])
    assert [len(x) for x in found[1:]] == [2, 3]
    whole, picks = torch.cat(parts), torch.tensor([7, 0, 3])
    assert torch.equal(found.rows[picks], whole[picks])
    assert torch.equal(found.rows[2:5], whole[2:5])
    assert torch.equal(found.rows[4], whole[4])
    assert len(found.rows) == 8
    assert not list(tmp_path.iterdir()), "a file has no name any more, so that nothing is left of it"


@pytest.mark.parametrize("method", [Frontier(rounds=1, rows=34), QDrop(iterations=4, batch=2)], ids=repr)
def test_a_calibration_from_files_gives_the_same_bits(method: PTQMethod, tmp_path, caplog):
    found = []
    caplog.set_level(logging.INFO)
    for cache in (None, Cache(1e-9, tmp_path)):
        method.cache = cache
        model = tiny("deit", *build_recipe("frontier", w_bits=3, a_bits=3))
        method(model, batches())
        found.append(model.state_dict())
    method.cache = None
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert "inputs and outputs of a unit, for 4 images, take 0.0 GB, in files, for calibration.cache_gb is 1e-09" in (
        caplog.text
    )
    assert not list(tmp_path.iterdir())


def test_the_need_is_that_of_the_largest_unit(caplog):
    class Unit:
        def __init__(self, width: int) -> None:
            self.run = lambda x: torch.zeros(1, width)

    caplog.set_level(logging.INFO)
    cache = Cache(gigabytes=0.9)
    cache.plan([Unit(10), Unit(100_000), Unit(150_000), Unit(5)], torch.zeros(1, 3), images=500, copies=2)
    assert cache.full, "500 * 2 * 250,000 * 4 bytes are 1 GB"
    assert "for 500 images, take 1.0 GB, in files" in caplog.text
    caplog.clear()
    cache.gigabytes = 1.1
    cache.plan([Unit(10), Unit(100_000), Unit(150_000), Unit(5)], torch.zeros(1, 3), images=500, copies=2)
    assert not cache.full
    assert caplog.text.strip().endswith("take 1.0 GB, in memory")
