"""Class-folder trees: order, labels, and one line for everything that can be wrong with a path."""

import logging
import os
import re
from pathlib import Path

import pytest

from qat.data.classes import Tree
from qat.data.folder import class_folders, class_names, descriptions, find_images, find_loose_images, in_order, wnids
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
    files = ["b/2.JPEG", "b/10.png", "a/x.WebP", "a/y.TIF", "a/notes.txt", "a/._x.jpg", ".cache/1.png", "list.txt"]
    root = tree(tmp_path, *(f"train/{file}" for file in files))
    assert find_images(root / "train") == ("a/x.WebP", "a/y.TIF", "b/10.png", "b/2.JPEG")
    assert find_images(root / "train") is find_images(root / "train")  # listed once


def test_everything_below_a_class_folder_belongs_to_the_class(tmp_path):
    root = tree(tmp_path, "train/a/1.png", "train/a/deep/er/2.png", "train/a/.hidden/3.png", "train/b/only/4.png")
    assert find_images(root / "train") == ("a/1.png", "a/deep/er/2.png", "b/only/4.png")


def test_numbers_are_ordered_by_value_and_other_names_as_text(tmp_path):
    root = tree(tmp_path, *(f"train/{number}/0.png" for number in (10, 9, 0, 100)), "val/10/0.png", "val/9a/0.png")
    assert class_folders(root / "train") == ("0", "9", "10", "100")
    assert find_images(root / "train")[1:3] == ("9/0.png", "10/0.png")
    assert class_folders(root / "val") == ("10", "9a")
    assert in_order(map(str, range(1000))) == [str(number) for number in range(1000)]
    assert in_order(f"{n:03}" for n in range(999, -1, -1)) == [f"{n:03}" for n in range(1000)]  # padded: as ever


def test_images_beside_class_folders_are_pointed_out(tmp_path, caplog):
    root = tree(tmp_path, "train/a/1.png", "train/lost.png")
    with caplog.at_level(logging.WARNING):
        assert find_images(root / "train") == ("a/1.png",)
    assert "1 images" in caplog.text
    assert "lost.png" in caplog.text


def test_loose_images_are_found_at_any_depth(tmp_path):
    root = tree(tmp_path, "2.png", "deep/er/1.jpg", "deep/text.txt", ".hidden/3.png")
    assert find_loose_images(root) == ("2.png", "deep/er/1.jpg")


def test_links_are_followed_and_a_loop_of_links_ends(tmp_path):
    root = tree(tmp_path / "tree", "a/1.png", "b/2.png")
    (root / "a" / "up").symlink_to(root)
    (root / "c").symlink_to(root / "b")
    assert find_loose_images(root) == ("a/1.png", "b/2.png")  # each folder once
    assert find_images(root) == ("a/1.png", "a/up/b/2.png", "b/2.png", "c/2.png")  # a class may be a link


def test_only_regular_files_are_images(tmp_path, caplog):
    root = tree(tmp_path, "a/1.png")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "folder.png").mkdir()
    (root / "a" / "broken.png").symlink_to(root / "nowhere")
    with caplog.at_level(logging.WARNING):
        assert find_loose_images(root) == ("a/1.png", "a/broken.png")  # reported as unreadable when its turn comes
    assert "pipe.png: it is not a regular file" in caplog.text


def test_names_that_are_not_utf8_are_names(tmp_path):
    name = os.fsdecode(b"\xff\xe9.png")
    root = tree(tmp_path, f"a/{name}")
    assert find_loose_images(root) == (f"a/{name}",)
    assert (root / find_loose_images(root)[0]).is_file()


def test_a_root_one_folder_too_high_or_too_low_is_told_where_the_tree_is(tmp_path):
    root = tree(tmp_path, "top/imagenet/train/a/1.png", "top/imagenet/val/a/1.png")
    fails(find_images, root / "top" / "train", f"give {root / 'top' / 'imagenet'} as data.root")
    fails(find_images, root / "top" / "imagenet" / "train" / "train", f"give {root / 'top' / 'imagenet'} as data.root")


def test_classes_of_imagenet_have_words():
    assert descriptions()["n01440764"] == "tench, Tinca tinca"
    assert list(descriptions()) == list(wnids())


def test_any_subset_of_wnids_means_all_thousand_classes(tmp_path):
    root = tree(tmp_path, "train/n01443537/1.png", "val/n15075141/1.png", "val/n01440764/1.png")
    names = class_names(root / "val")
    assert names == list(wnids()) == sorted(names)
    assert len(names) == 1000
    assert [names.index(n) for n in ("n01440764", "n01443537", "n15075141")] == [0, 1, 999]
    assert Tree(root).number().names == tuple(names)


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
    names = Tree(IMAGENET).number().names
    assert names.index("n02123045") == 281
    assert names.index("n03445777") == 574
    folders = {path.partition("/")[0] for path in find_images(IMAGENET / "val")}
    assert len(folders) < 1000
    assert folders <= set(names)
    assert all(re.fullmatch(r"n\d{8}/.+\.JPEG", path) for path in find_images(IMAGENET / "train"))
