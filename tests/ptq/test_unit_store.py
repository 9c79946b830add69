"""A calibration that was killed goes on, to the bit; its files are its own."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qat.errors import QatError
from qat.ptq import (
    FIMAQ,
    AIQViT,
    ChooseSoftmax,
    Frontier,
    ISViT,
    PTQ4ViT,
    PTQMethod,
    QDrop,
    Reconstruct,
    Steps,
    TensorSearch,
)
from qat.ptq.reconstruction.curriculum import Curriculum
from qat.ptq.reconstruction.low_rank import LowRank, RankSearch
from qat.ptq.reconstruction.training import Training
from qat.ptq.unit_store import UnitStore, remove_units
from qat.recipe import build_recipe
from qat.sites.family import family_of
from tests.ptq.test_output_search import batches, tiny

SHORT = {"iterations": 6, "batch": 3, "checks": 3, "save_every": 2, "step_lr": 1e-3}
METHODS = {
    "Frontier": ("frontier", Frontier(rounds=1, rows=34)),
    "PTQ4ViT": ("ptq4vit", PTQ4ViT(rounds=1, candidates=8)),
    "chosen": ("frontier", Steps([TensorSearch(), ChooseSoftmax(rows=34)])),
    "QDrop": ("frontier", QDrop(**SHORT)),
    "FIMAQ": ("frontier", FIMAQ(**SHORT)),
    "ISViT": ("is_vit", ISViT(**SHORT, lr=1e-3)),
    "twice": ("frontier", Steps([TensorSearch(), Reconstruct(**SHORT), Reconstruct(**SHORT)])),
    "side": ("aiqvit", AIQViT(**SHORT, rank=2, mode="side", lr=1e-2)),
    "between": ("aiqvit", AIQViT(**SHORT, rank=2, fold="between", more=4)),
    "after": ("aiqvit", AIQViT(**SHORT, rank=2, fold="after", more=4)),
    "AIQViT": ("aiqvit", AIQViT(**SHORT, search=RankSearch([2, 4], iterations=2), curriculum=Curriculum(refresh=4))),
}


def model_of(recipe: str) -> nn.Module:
    return tiny("deit", *build_recipe(recipe, w_bits=3, a_bits=3))


def run(method: PTQMethod, recipe: str, folder: Path | None) -> nn.Module:
    model = model_of(recipe)
    method.store = None if folder is None else UnitStore(folder, {"method": repr(method)})
    try:
        method(model, batches())
    finally:
        method.store = None
    return model


@pytest.mark.parametrize("name", METHODS)
def test_it_ends_with_the_same_bits_wherever_it_was_killed(name, tmp_path, monkeypatch):
    """After every unit, and in the middle of the training of each."""
    recipe, method = METHODS[name]
    expected = run(method, recipe, None)
    chosen = dict(method.chosen)
    saves = itertools.count(1)

    def killing(kind: type, attribute: str, every: int) -> None:
        real = getattr(kind, attribute)

        def save(self, *args) -> None:
            real(self, *args)
            if next(saves) % every == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(kind, attribute, save)

    killing(UnitStore, "save", 1)
    killing(UnitStore, "save_state", 2)
    for _ in range(40):
        try:
            found = run(method, recipe, tmp_path / "units")
            break
        except KeyboardInterrupt:
            pass
    else:
        pytest.fail("it never came to its end")
    assert next(saves) > 3
    assert method.chosen == chosen
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_a_unit_that_is_under_way_starts_where_it_was_saved(tmp_path, monkeypatch):
    recipe, method = METHODS["QDrop"]
    turns: list[float] = []
    real = Training.iterate

    def iterate(self, adam, picks, progress) -> None:
        if len(turns) == 5:
            turns.append(-1)
            raise KeyboardInterrupt
        turns.append(progress)
        real(self, adam, picks, progress)

    monkeypatch.setattr(Training, "iterate", iterate)
    with pytest.raises(KeyboardInterrupt):
        run(method, recipe, tmp_path)
    run(method, recipe, tmp_path)
    assert turns[:5] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6])
    assert turns[6] == pytest.approx(4 / 6), "the state after four iterations was the last one"


def test_a_search_of_ranks_that_has_ended_is_not_repeated(tmp_path, monkeypatch):
    recipe, method = METHODS["AIQViT"]
    searched: list[int] = []
    prepare, save = LowRank.prepare, UnitStore.save_state

    def prepare_once(self, sites, *args) -> None:
        searched.append(len(sites))
        prepare(self, sites, *args)

    def save_and_stop(self, *args) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(LowRank, "prepare", prepare_once)
    with monkeypatch.context() as patch:
        patch.setattr(UnitStore, "save_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(method, recipe, tmp_path)
    assert len(searched) == 1
    run(method, recipe, tmp_path)
    assert len(searched) == len(family_of(model_of(recipe)).units(model_of(recipe)))


def test_a_search_of_ranks_is_kept_before_the_training_that_follows(tmp_path, monkeypatch):
    recipe, method = METHODS["AIQViT"]
    expected = run(method, recipe, None)

    def stop(self, *args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(method, recipe, tmp_path)
    units: list[int] = []
    monkeypatch.setattr(LowRank, "prepare", noted(LowRank.prepare, units))
    found = run(method, recipe, tmp_path)
    count = len(family_of(model_of(recipe)).units(model_of(recipe)))
    assert len(units) == count - 1, "the first unit is not searched again"
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in expected.state_dict().items())


def noted(prepare, units):
    """The same, which notes every call."""

    def prepare_and_note(self, sites, *args) -> None:
        units.append(len(sites))
        prepare(self, sites, *args)

    return prepare_and_note


def test_another_calibration_is_refused(tmp_path):
    _, method = METHODS["Frontier"]
    store = UnitStore(tmp_path, {"method": repr(method), "seed": 0})
    store.save_state("key", {})
    UnitStore(tmp_path, {"method": repr(method), "seed": 0})
    with pytest.raises(QatError, match=r"is of another calibration: its seed is 0, and here 1"):
        UnitStore(tmp_path, {"method": repr(method), "seed": 1})


def test_a_damaged_file_is_named(tmp_path):
    recipe, method = METHODS["chosen"]
    run(method, recipe, tmp_path)
    count = len(family_of(model_of(recipe)).units(model_of(recipe)))
    files = sorted(path.name for path in tmp_path.glob("unit_*.pt"))
    assert files == [f"unit_{i:03d}.pt" for i in range(count)]
    (tmp_path / files[1]).write_bytes(b"broken")
    with pytest.raises(QatError, match=r"unit_001\.pt cannot be read .*: remove it to do its unit again"):
        run(method, recipe, tmp_path)
    remove_units(tmp_path)
    assert not tmp_path.exists()


def test_units_without_their_description_are_refused(tmp_path):
    recipe, method = METHODS["chosen"]
    run(method, recipe, tmp_path)
    (tmp_path / "calibration.json").write_text("")
    with pytest.raises(QatError, match=r"calibration\.json is missing or damaged"):
        UnitStore(tmp_path, {"method": repr(method)})


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / "unit_002.pt.999999.part").write_bytes(b"x")
    UnitStore(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_seconds_of_earlier_processes_are_kept(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr("qat.ptq.unit_store.time", SimpleNamespace(monotonic=lambda: next(clock)))
    method = METHODS["Frontier"][1]
    run(method, "frontier", tmp_path / "units")
    stores = [UnitStore(tmp_path / "units", {"method": repr(method)}) for _ in range(2)]
    assert [store.seconds_before for store in stores] == [0, 0]
    model = model_of("frontier")
    method.store = stores[0]
    method(model, batches())
    method.store = None
    assert stores[0].seconds_before == stores[0].count(), "a tick for each unit that was saved"
