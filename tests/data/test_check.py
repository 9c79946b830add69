"""What is found out about images before a model is built: the number of classes, and whether one can be read."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from qat.data.check import check_data
from qat.data.options import DataOptions
from qat.errors import QatError
from tests.conftest import write_images


def model(**options: object) -> SimpleNamespace:
    given = {"num_classes": None, "classes": None, "teacher": None, "checkpoint": None, "fresh_head": False}
    return SimpleNamespace(**{**given, "quant_checkpoint": None, **options})


def numbered(root: Path, count: int) -> DataOptions:
    write_images(root / "images", 1, seed=0)
    for number in range(count):
        (root / "val" / str(number)).mkdir(parents=True)
        (root / "val" / str(number) / "0.png").symlink_to(root / "images" / "ant" / "0.png")
    return DataOptions(root=root)


def test_numbered_folders_of_weights_without_names_are_pointed_out(tmp_path, caplog):
    options = numbered(tmp_path, 12)
    for checkpoint, said in ((None, 0), ("pretrained", 1)):
        found = model(checkpoint=checkpoint)
        with caplog.at_level(logging.WARNING):
            check_data("validate", found, options, None, calibrates=False)
        assert found.classes == [str(number) for number in range(12)]
        assert found.num_classes == 12
        assert caplog.text.count("cannot be matched by name: '0' is taken as class 0, '1' as class 1") == said


def test_some_numbered_folders_are_classes_of_a_model_with_more(tmp_path):
    options, found = numbered(tmp_path, 3), model(num_classes=1000)
    check_data("validate", found, options, None, calibrates=False)
    assert found.classes[:3] == ["0", "1", "2"]
    assert len(found.classes) == 1000


def test_a_tree_one_folder_too_deep_is_recognized(tmp_path):
    write_images(tmp_path / "val" / "images", 1, seed=0)
    with pytest.raises(QatError, match=r"has one class folder, 'images'.*has 3 folders, 'ant', ...: are those the"):
        check_data("validate", model(), DataOptions(root=tmp_path), None, calibrates=False)


def test_one_readable_image_is_enough(tmp_path):
    write_images(tmp_path / "val", 1, seed=0)
    (tmp_path / "val/ant/0.png").write_text("<html>")
    check_data("validate", model(), DataOptions(root=tmp_path), None, calibrates=False)
    (tmp_path / "val/bee/0.png").write_text("<html>")
    (tmp_path / "val/cat/0.png").write_text("<html>")
    with pytest.raises(QatError, match=r"none of the 3 images of .*val can be read, first .*ant/0.png: not an image"):
        check_data("validate", model(), DataOptions(root=tmp_path), None, calibrates=False)
