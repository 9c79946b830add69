"""Label files of validation images in one folder, one of each kind that distributors give."""

import sys
from pathlib import Path

import numpy as np
import pytest

from qat.data.classes import Classes, Tree, forget_listings
from qat.data.folder import wnids
from qat.data.label_file import read_csv, read_label_file
from qat.errors import QatError

NAMES = tuple(f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3))
A, B, C = "n01440764", "n01443537", "n15075141"  # labels 0, 1 and 999


def flat(root: Path, label_file: str, content: str, folder: str = "val") -> Tree:
    for name in NAMES:
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (root / folder / name).touch()
    (root / label_file).parent.mkdir(parents=True, exist_ok=True)
    (root / label_file).write_text(content)
    return Tree(root)


def labels(tree: Tree) -> list[int]:
    return tree.number().of(tree.source("val"))


@pytest.mark.parametrize("place", ["val/val.txt", "val.txt", "meta/val.txt"])
@pytest.mark.parametrize(
    "lines",
    ["{2} 0\n{0} 999\n{1} 1\n", "./{0} n15075141\nval/{1} n01443537\n\n{2}\tn01440764\n"],
    ids=["labels of ILSVRC and Caffe", "wnids"],
)
def test_lists_of_names_are_found_by_their_usual_places(tmp_path, place, lines):
    tree = flat(tmp_path, place, lines.format(*NAMES))
    assert tree.source("val").names == NAMES
    assert labels(tree) == [999, 1, 0]
    assert tree.number().names == wnids()


def test_kaggles_table(tmp_path):
    stems = [name.partition(".")[0] for name in NAMES]
    rows = [f"{stem},{name} 85 1 499 272 {name} 1 2 3 4 " for stem, name in zip(stems, (B, C, A), strict=True)]
    tree = flat(tmp_path, "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows[::-1]]))
    assert labels(tree) == [1, 999, 0]


def test_tiny_imagenet(tmp_path):
    tree = flat(tmp_path, "val/val_annotations.txt", "".join(f"{n}\t{A}\t0\t32\t44\t62\n" for n in NAMES), "val/images")
    (tmp_path / "train" / A / "images").mkdir(parents=True)
    (tmp_path / "train" / A / "images" / "0.JPEG").touch()
    assert tree.source("train").names == (f"{A}/images/0.JPEG",)
    assert tree.source("val").names == tuple(f"images/{name}" for name in NAMES)
    assert set(tree.source("val").keys) == set(tree.source("train").keys) == {A}


GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


def test_the_development_kit_by_its_text(tmp_path):
    tree = flat(tmp_path, GROUND_TRUTH, "3\n1\n2\n")
    (tmp_path / GROUND_TRUTH).with_name("map_clsloc.txt").write_text(f"{A} 1 tench\n{C} 2 tissue\n{B} 3 goldfish\n")
    assert labels(tree) == [1, 0, 999]


def test_the_development_kit_by_its_matlab_file(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    tree = flat(tmp_path, GROUND_TRUTH, "3\n1\n2\n")
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    rows = [(1, A, "tench"), (2, C, "tissue"), (3, B, "goldfish"), (1001, "n00000000", "no leaf")]
    scipy.savemat((tmp_path / GROUND_TRUTH).with_name("meta.mat"), {"synsets": np.array(rows, kinds)})
    assert labels(tree) == [1, 0, 999]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (GROUND_TRUTH, "1\n2\n", "has 2 lines for 3 images"),
        (GROUND_TRUTH, "1\n2\n1\n", "put map_clsloc.txt or meta.mat"),
        ("val.txt", f"{NAMES[0]} 0\n{NAMES[1]} 1\n", f"has no label for {NAMES[2]}, and for 0 more of 3"),
        ("val.txt", f"{NAMES[0]} 0\n{NAMES[0]} 1\n", "val.txt, line 2: .* has the class '1' here and '0' above"),
        ("val.txt", f"{NAMES[0]} 0\n{NAMES[1]}\n", "val.txt, line 2: expected the name of an image and its class"),
        ("LOC_val_solution.csv", f'a,0\n"{NAMES[0]},0\nb,1\n', "line 2: a quotation mark is not closed"),
        pytest.param("LOC_val_solution.csv", f"a,0\n{'b' * 131_073},0", "line 2: field larger than", id="long cell"),
        ("other.txt", "", "holds images and no class folders: give the file of their labels as data.val_labels"),
    ],
)
def test_a_label_file_that_does_not_fit_is_refused_with_its_line(tmp_path, file, content, message):
    tree = flat(tmp_path, file, content)
    with pytest.raises(QatError, match=message) as caught:
        tree.source("val")
    assert "\n" not in str(caught.value)


def test_a_matlab_file_without_scipy_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as if it were not installed
    tree = flat(tmp_path, GROUND_TRUTH, "1\n1\n1\n")
    (tmp_path / GROUND_TRUTH).with_name("meta.mat").touch()
    with pytest.raises(QatError, match="pip install scipy"):
        tree.source("val")


def test_a_file_that_is_named_wins_over_class_folders(tmp_path):
    tree = flat(tmp_path, "mine.csv", "file,label\n" + "".join(f"{name},{A}\n" for name in NAMES), "val/any")
    assert set(tree.source("val").keys) == {"any"}
    assert set(Tree(tmp_path, val_labels=tmp_path / "mine.csv").source("val").keys) == {A}
    with pytest.raises(QatError, match=r"data.val_labels: cannot read .*none.txt"):
        Tree(tmp_path, val_labels=tmp_path / "none.txt").source("val")


def test_labels_out_of_range_are_refused(tmp_path):
    tree = flat(tmp_path, "val.txt", f"{NAMES[0]} 0\n{NAMES[1]} 1000\n{NAMES[2]} 2\n")
    with pytest.raises(QatError, match="the class '1000' is none of the 1000"):
        labels(tree)
    for digits in (5000, 12):
        (tmp_path / "val.txt").write_text("".join(f"{name} {'9' * digits}\n" for name in NAMES))
        forget_listings()
        with pytest.raises(QatError, match="999") as caught:
            Classes(("a", "b"), {"a": 0, "b": 1}).of(tree.source("val"))
        assert len(str(caught.value)) < 1000


def test_a_label_that_no_model_has_is_refused_before_its_classes_are_counted(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.png").touch()
    (tmp_path / "val.txt").write_text("a.png 99999999999\n")
    with pytest.raises(QatError, match="the label 99999999999 is too large: a model has at most 1,000,000 classes"):
        Tree(tmp_path).number()


def test_a_table_may_have_line_ends_in_quotation_marks(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'"a\r\nb.png",ant\r\n"c\xe2\x80\xa8d.png",bee\r\n\r\ne.png,"c""at"')
    rows = [(1, ["a\nb.png", "ant"]), (3, ["c\u2028d.png", "bee"]), (5, ["e.png", 'c"at'])]
    assert list(read_csv(tmp_path / "a.csv", "data.val_labels")) == rows


def test_only_line_ends_end_a_line(tmp_path):
    (tmp_path / "list.txt").write_bytes("a\u2028b.png ant\r\nc\x0cd.png bee\r\n".encode())
    assert read_label_file(tmp_path / "list.txt", ["a\u2028b.png", "c\x0cd.png"])[0] == ("ant", "bee")


def test_short_names_count_only_where_one_image_is_meant(tmp_path):
    (tmp_path / "list.txt").write_text("a/1.png ant\nb/1.png bee\nc/2.png cat\n")
    assert read_label_file(tmp_path / "list.txt", ["a/1.png", "x/2.png"])[0] == ("ant", "cat")
    with pytest.raises(QatError, match=r"no label for x/1\.png"):
        read_label_file(tmp_path / "list.txt", ["x/1.png"])
