"""Folders and images as people have them, through whole commands."""

from __future__ import annotations

import csv
import os
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from qat.cli.lightning_cli import QatCLI
from qat.cli.main import main, run
from qat.data.softlabels.reader import SoftLabels
from tests.conftest import TINY, label_options, write_images
from tools.make_softlabels import main as make_softlabels

WNIDS = ("n01440764", "n01443537", "n15075141")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a float model with random weights."""
    path = tmp_path_factory.mktemp("plain") / "plain.yaml"
    model = {"arch": "deit_tiny_patch16_224", "model_args": TINY, "checkpoint": None}
    trainer = {"accelerator": "cpu", "devices": 1}
    path.write_text(yaml.safe_dump({"model": model, "trainer": trainer, "data": {"workers": 0}}))
    return path


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Images of three classes of ImageNet."""
    write_images(tmp_path / "val", 2, seed=0)
    for name, wnid in zip(("ant", "bee", "cat"), WNIDS, strict=True):
        (tmp_path / "val" / name).rename(tmp_path / "val" / wnid)
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qat: error: ")
    assert error.count("\n") == 1
    return error


def evaluated(cli: QatCLI) -> int:
    return round(float(cli.trainer.callback_metrics["val/images"]))


def test_a_subset_of_imagenet_has_a_small_head_by_choice(plain, imagenet, capsys):
    few = ["validate", "--config", str(plain), "--data.root", str(imagenet), "--model.num_classes", "3"]
    assert "--data.classes folders takes those that exist" in fails(capsys, *few)
    cli = run([*few, "--data.classes", "folders"])
    assert cli.model.card.classes == list(WNIDS)
    assert run([*few[:-2], "--data.classes", "folders"]).model.card.num_classes == 3
    assert run(few[:-2]).model.card.num_classes == 1000


def test_a_checkpoint_is_evaluated_on_some_of_its_classes_without_training_images(ckpt, images, tmp_path, capsys):
    for name in ("ant", "cat"):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / name).symlink_to(images / "val" / name)
    cli = run(["validate", "--ckpt", str(ckpt), "--data.root", str(tmp_path), "--data.workers", "0"])
    assert evaluated(cli) == 8
    (batch, *_) = cli.datamodule.val_dataloader()
    assert set(batch.labels.tolist()) == {0, 2}
    (tmp_path / "val" / "dog").symlink_to(images / "val" / "bee")
    assert "'dog'" in fails(capsys, "validate", "--ckpt", ckpt, "--data.root", tmp_path / "." / "val" / "..")


def test_words_stand_beside_wnids_in_predictions(plain, imagenet, tmp_path):
    out = tmp_path / "out.csv"
    args = ["--data.root", str(imagenet), "--data.classes", "folders", "--output", str(out)]
    assert main(["predict", "--config", str(plain), *args]) == 0
    (row, *_) = csv.DictReader(out.open())
    assert list(row)[:4] == ["path", "class_1", "name_1", "prob_1"]
    words = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}
    named = {row[f"class_{k}"]: row[f"name_{k}"] for k in (1, 2, 3)}
    assert named["n15075141"].startswith("toilet tissue")
    assert named.items() >= words.items()


def test_predict_takes_any_name_and_leaves_out_what_is_no_file(ckpt, images, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    (folder / name).write_bytes((images / "val/ant/0.png").read_bytes())
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    args = ["--data.images", str(folder), "--data.workers", "1", "--output", str(tmp_path / "out.csv")]
    assert main(["predict", "--ckpt", str(ckpt), *args]) == 0
    assert b"\ncaf\xe9.png," in (tmp_path / "out.csv").read_bytes().replace(b"\r", b"")
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_predict_turns_images_upright_unless_told_otherwise(ckpt, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :, 0] = pixels[20:, :, 2] = 255
    (tmp_path / "some").mkdir()
    Image.fromarray(pixels).save(tmp_path / "some/turned.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(pixels[::-1, ::-1])).save(tmp_path / "some/upright.png")
    rows = []
    for option in ("null", "false"):
        args = ["--data.images", str(tmp_path / "some"), "--output", str(tmp_path / "out.csv"), "--data.workers", "0"]
        assert main(["predict", "--ckpt", str(ckpt), *args, "--data.exif_orientation", option]) == 0
        rows.append([row[1:] for row in list(csv.reader((tmp_path / "out.csv").open()))[1:]])
    assert rows[0][0] == rows[0][1]
    assert rows[1][0] != rows[1][1]


@pytest.mark.parametrize("skip", ["error", "skip"])
def test_images_of_which_none_can_be_read_are_refused_before_any_work(ckpt, images, tmp_path, capsys, skip):
    write_images(tmp_path / "val", 1, seed=0)
    for image in (tmp_path / "val").glob("*/*"):
        image.write_text("<html>")
    args = ("--ckpt", ckpt, "--data.on_bad_image", skip)
    error = fails(capsys, "validate", *args, "--data.root", tmp_path)
    assert "none of the 3 images of" in error
    assert "ant/0.png: not an image" in error
    out = tmp_path / "out.csv"
    assert "none of the 3" in fails(capsys, "predict", *args, "--data.images", tmp_path / "val", "--output", out)
    assert not out.exists()


def test_a_validation_of_no_image_is_refused(ckpt, images, tmp_path, capsys):
    write_images(tmp_path / "val", 2, seed=0)
    for image in (tmp_path / "val" / "ant").iterdir():
        image.write_text("<html>")
    args = ("--data.on_bad_image", "skip", "--data.val_batch_size", 2, "--trainer.limit_val_batches", 1)
    error = fails(capsys, "validate", "--ckpt", ckpt, "--data.root", tmp_path, "--data.workers", 0, *args)
    assert "not a single validation image could be read" in error


def test_a_full_disk_is_one_line_and_leaves_no_half_table(ckpt, images, tmp_path, capsys):
    out = tmp_path / "out.csv"
    out.write_text("before")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = ("predict", "--ckpt", ckpt, "--data.images", images / "val", "--output", out, "--data.workers", 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        error = fails(capsys, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {out}: File too large" in error
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_soft_labels_of_a_tar_are_those_of_its_folder_and_can_be_trained_on(images, ckpt, config, softlabels, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(images / split, ".")
    out = tmp_path / "labels.h5"
    assert make_softlabels(label_options(tmp_path, ckpt, out)) == 0
    assert out.read_bytes() == softlabels.read_bytes()
    options = ["--data.root", str(tmp_path), "--data.softlabels", str(softlabels), "--trainer.max_steps", "1"]
    cli = run(["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), *options])
    assert cli.trainer.global_step == 1
    assert isinstance(cli.datamodule.sets.store, SoftLabels)


def test_turned_images_and_soft_labels_contradict_each_other(images, config, softlabels, capsys):
    options = ("--data.root", images, "--data.softlabels", softlabels, "--data.exif_orientation", "true")
    assert "data.exif_orientation turns images" in fails(capsys, "fit", "--config", config, *options)
