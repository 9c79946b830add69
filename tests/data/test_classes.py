"""The labels of class folders: by their names, by numbers, by a class map, by the classes of a model."""

import logging
from pathlib import Path

import pytest

from qat.data.classes import Tree, forget_listings
from qat.data.folder import wnids
from qat.errors import QatError


def tree(root: Path, *files: str, **options: object) -> Tree:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return Tree(root, **options)


def labels(images: Tree, split: str, known: tuple[str, ...] = ()) -> list[int]:
    return images.number(known).of(images.source(split))


WNIDS = ("n01443537", "n15075141")


def test_some_folders_of_imagenet_have_the_labels_of_all_or_by_choice_their_own(tmp_path):
    files = [f"{split}/{name}/0.png" for split in ("train", "val") for name in WNIDS]
    images = tree(tmp_path, *files)
    assert labels(images, "val") == [1, 999]
    assert images.number().names == wnids()
    few = Tree(tmp_path, classes="folders")
    assert few.number().names == WNIDS
    assert labels(few, "train") == labels(few, "val") == [0, 1]


def test_names_are_numbered_by_the_training_folders(tmp_path):
    images = tree(tmp_path, *(f"train/{name}/0.png" for name in ("cat", "ant", "n01440764")), "val/cat/0.png")
    assert images.number().names == ("ant", "cat", "n01440764")
    assert labels(images, "val") == [1]
    (tmp_path / "val" / "dog").mkdir()
    (tmp_path / "val" / "dog" / "0.png").touch()
    forget_listings()
    with pytest.raises(QatError, match=r"val: the class 'dog' is none of the 3 of the training images, ant, cat, n0"):
        labels(images, "val")


def test_classes_of_a_checkpoint_are_matched_by_name_without_training_images(tmp_path):
    images = tree(tmp_path, "val/cat/0.png", "val/ant/0.png")
    assert labels(images, "val", ("ant", "bee", "cat")) == [0, 2]
    with pytest.raises(QatError, match="the class 'cat' is none of the 2 of the model, ant, bee"):
        labels(images, "val", ("ant", "bee"))


def test_numbered_folders_are_the_labels_of_a_model_with_names_and_this_is_said(tmp_path, caplog):
    images = tree(tmp_path, "val/999/0.png", "val/7/0.png", "val/10/0.png")
    with caplog.at_level(logging.WARNING):
        assert labels(images, "val", wnids()) == [7, 10, 999]
        assert labels(images, "val", wnids()) == [7, 10, 999]
    assert caplog.text.count("cannot be matched by name") == 1
    with pytest.raises(QatError, match="the class '7' is none of the 3 of the model"):
        labels(images, "val", ("ant", "bee", "cat"))


# ---- class maps


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.txt", "cat\nbee\nant\n"),
        ("map.csv", "name,label\nant,2\ncat,0\nbee,1\n"),
        ("map.json", '{"ant": 2, "bee": 1, "cat": 0}'),
        ("list.json", '["cat", "bee", "ant"]'),
    ],
)
def test_a_class_map_gives_the_label_of_every_folder(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    images = tree(tmp_path, "train/ant/0.png", "train/cat/0.png", "val/bee/0.png", class_map=tmp_path / name)
    assert images.number().names == ("cat", "bee", "ant")
    assert labels(images, "train") == [2, 0]
    assert labels(images, "val") == [1]
    assert images.number(("n0", "n1", "n2")).names == ("n0", "n1", "n2")  # the map translates to those of the model
    assert labels(images, "val", ("n0", "n1", "n2")) == [1]
    with pytest.raises(QatError, match="has 3 classes, the model 2"):
        images.number(("a", "b"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("map.pkl", "", "a pickle can run code"),
        ("map.xml", "", "give a .txt file"),
        ("map.txt", "cat\n\nant\n", "map.txt, line 2: expected the name of a class"),
        ("map.txt", "cat\nant\ncat\n", "map.txt, line 3: the class 'cat' has the label 0 already"),
        ("map.txt", "", "has no class"),
        ("map.csv", "cat,0\nant,0\n", "map.csv, line 2: the label 0 belongs to the class 'cat' already"),
        ("map.csv", "cat,0\nant\n", "map.csv, line 2: expected"),
        ("map.csv", "cat,0\nant,-1\n", "map.csv, line 2: expected .* found 'ant', '-1'"),
        ("map.json", '{"cat": 0, "ant": 2}', "gives the label 1 to no class"),
        ("map.json", '{"cat": 0.5}', "found 'cat', 0.5"),
        ("map.json", "[1", "is no JSON"),
        pytest.param("map.json", "[" * 100_000, "is no JSON", id="deep"),
        ("map.json", "[[1]]", "a list where the name of a class belongs"),
        pytest.param("map.csv", f"cat,0\nant,{'1' * 5000}", "line 2: expected .* found 'ant', '11", id="5,000 digits"),
        pytest.param("map.csv", f"cat,0\n{'a' * 131_073},1", "map.csv, line 2: field larger", id="long cell"),
        ("map.json", "3", "holds a int"),
        ("map.json", '["a", "a"]', "names a class twice"),
        ("none.txt", None, "cannot read .*none.txt: No such file"),
    ],
)
def test_a_class_map_that_cannot_be_used_is_refused_with_its_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(QatError, match=message) as caught:
        Tree(tmp_path, class_map=tmp_path / name).number()
    assert "\n" not in str(caught.value)


def test_a_folder_that_the_class_map_lacks_is_named(tmp_path):
    (tmp_path / "map.txt").write_text("cat\nant\n")
    images = tree(tmp_path, "train/bee/0.png", class_map=tmp_path / "map.txt")
    with pytest.raises(QatError, match="the class 'bee' is none of the 2"):
        labels(images, "train")
