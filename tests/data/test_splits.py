"""Where training and validation images are found: usual names of folders, and what is no data set of ours."""

import sys
from pathlib import Path

import pytest
import torch

from qat.data.classes import Tree
from qat.data.decode import decode
from qat.errors import QatError
from tests.conftest import write_images


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation"), ("train", "valid")])
def test_the_names_that_timm_looks_for(tmp_path, train, val):
    write_images(tmp_path / train, 1, seed=0)
    write_images(tmp_path / val, 2, seed=0)
    tree = Tree(tmp_path)
    assert (tree.source("train").place, tree.source("val").place) == (tmp_path / train, tmp_path / val)
    assert (len(tree.source("train")), len(tree.source("val"))) == (3, 6)
    assert tree.source("val").keys == ("ant", "ant", "bee", "bee", "cat", "cat")


@pytest.mark.parametrize("prefix", ["wds", "tfds", "hfids"])
def test_streams_of_timm_are_refused_by_name(prefix):
    with pytest.raises(QatError, match=f"data.root is {prefix}/x: the readers of timm for {prefix}/ have no list"):
        Tree(Path(prefix, "x")).source("train")


def test_a_hugging_face_data_set_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(QatError, match="hfds/some/data, which needs a package: pip install datasets"):
        Tree(Path("hfds/some/data")).source("train")


@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_a_hugging_face_data_set_on_disk_is_the_folder_that_it_was_made_of(tmp_path, kind, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    write_images(folder / "train", 2, seed=0)
    write_images(folder / "validation", 1, seed=1)
    if kind == "saved":
        datasets.load_dataset(str(folder)).save_to_disk(tmp_path / "saved")
    tree, plain = Tree(Path(f"hfds/{tmp_path / kind}")), Tree(folder)
    for split in ("train", "val"):
        ours, theirs = tree.source(split), plain.source(split)
        assert ours.keys == theirs.keys
        for index in range(len(theirs)):
            assert torch.equal(decode(ours.open(index)), decode(theirs.open(index)))
    assert tree.number().names == ("ant", "bee", "cat")


def test_a_hugging_face_data_set_has_an_order_of_its_classes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "folder" / "train", 1, seed=0)
    names = ["zebra", "10", "9"]  # neither sorted as text nor as numbers
    rows = datasets.load_dataset(str(tmp_path / "folder"))
    rows.cast_column("label", datasets.ClassLabel(names=names)).save_to_disk(tmp_path / "saved")
    tree = Tree(Path(f"hfds/{tmp_path / 'saved'}"))
    assert tree.number().names == tuple(names)
    for known in ((), ("a", "b", "c")):  # with a warning, because no name agrees
        assert tree.number(known).of(tree.source("train")) == [0, 1, 2]
