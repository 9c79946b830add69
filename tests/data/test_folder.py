"""Class-folder trees: order, labels, and one line for everything that can be wrong with a path."""

import re
from pathlib import Path

import pytest

from qat.data.folder import class_names, class_names_of, find_images, find_loose_images, wnids
from qat.errors import QatError

ROOT = Path(__file__).parents[2]
IMAGENET = ROOT.parent / "shared" / "data" / "imagenet"


def tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def fails(call, argument: Path, *parts: object) -> None:
    with pytest.raises(QatError) as caught:
        call(argument)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_images_are_listed_by_class_then_name_and_other_files_are_not(tmp_path):
    files = ["b/2.JPEG", "b/10.png", "a/x.WebP", "a/notes.txt", "a/._x.jpg", ".cache/1.png", "list.txt", "a/sub/1.png"]
    root = tree(tmp_path, *(f"train/{file}" for file in files))
    assert find_images(root / "train") == ("a/x.WebP", "b/10.png", "b/2.JPEG")
    assert find_images(root / "train") is find_images(root / "train")  # listed once


def test_loose_images_are_found_at_any_depth(tmp_path):
    root = tree(tmp_path, "2.png", "deep/er/1.jpg", "deep/text.txt", ".hidden/3.png")
    assert find_loose_images(root) == ("2.png", "deep/er/1.jpg")


def test_any_subset_of_wnids_means_all_thousand_classes(tmp_path):
    root = tree(tmp_path, "train/n01443537/1.png", "val/n15075141/1.png", "val/n01440764/1.png")
    names = class_names(root / "val")
    assert names == list(wnids()) == sorted(names)
    assert len(names) == 1000
    assert [names.index(n) for n in ("n01440764", "n01443537", "n15075141")] == [0, 1, 999]
    assert class_names_of(root) == names  # val has classes without a training folder: harmless, the numbers are fixed


def test_other_names_are_numbered_in_sorted_order(tmp_path):
    root = tree(tmp_path, "train/cat/1.png", "train/ant/1.png", "train/n01440764/1.png", "val/cat/1.png")
    assert class_names_of(root) == ["ant", "cat", "n01440764"]  # by train, of which val is a subset


def test_a_validation_class_that_training_lacks_is_named(tmp_path):
    root = tree(tmp_path, "train/ant/1.png", "val/ant/1.png", "val/bee/1.png", "val/cat/1.png")
    fails(class_names_of, root, root / "val" / "bee", root / "train" / "bee")
    mixed = tree(tmp_path / "mixed", "train/n01440764/1.png", "val/dog/1.png")
    fails(class_names_of, mixed, mixed / "val" / "dog")


def test_what_is_missing_is_named_with_what_is_expected(tmp_path):
    fails(
        find_images, tmp_path / "no" / "train", f"data.root {tmp_path / 'no'} is not a folder", "train/<class>/*.JPEG"
    )
    root = tree(tmp_path, "val/1.JPEG", "train/ant/1.txt")
    fails(find_images, root / "val", f"{root / 'val'} has no class folder", "val/<class>/*.JPEG")
    fails(find_images, root / "train", f"class folder {root / 'train' / 'ant'} has no image", ".jpeg")
    fails(find_images, root / "train" / "val", "has no 'val' folder")
    fails(find_loose_images, root / "train", f"{root / 'train'} has no image")
    fails(find_loose_images, root / "nowhere", f"{root / 'nowhere'} is not a folder")


@pytest.mark.real_data
@pytest.mark.skipif(not IMAGENET.is_dir(), reason=f"needs the ImageNet sample in {IMAGENET}")
def test_the_imagenet_sample_has_the_known_labels():
    names = class_names_of(IMAGENET)
    assert names.index("n02123045") == 281
    assert names.index("n03445777") == 574
    folders = {path.partition("/")[0] for path in find_images(IMAGENET / "val")}
    assert len(folders) < 1000
    assert folders <= set(names)
    assert all(re.fullmatch(r"n\d{8}/.+\.JPEG", path) for path in find_images(IMAGENET / "train"))
