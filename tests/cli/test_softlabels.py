"""Training on stored soft labels, through the real command."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from qat.cli.main import main, run
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.data.softlabels.reader import SoftLabels
from tests.conftest import interrupt_at_step, label_options, with_broken
from tools.make_softlabels import main as make_softlabels


def args(config: Path, runs: Path, labels: Path, *more: object) -> list[str]:
    return [
        "fit", "--config", str(config), "--runs", str(runs), "--data.softlabels", str(labels), *map(str, more)
    ]  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


def test_a_run_learns_from_the_labels_and_reports_the_kl(config: Path, softlabels: Path, tmp_path: Path) -> None:
    cli = run(args(config, tmp_path, softlabels))
    rows = metrics(Path(cli.trainer.default_root_dir))
    assert len(rows) == cli.trainer.global_step == 6 + 3
    for row in rows:
        loss, entropy, kl = (float(row[f"train/{name}"]) for name in ("loss", "label_entropy", "kl"))
        assert loss == pytest.approx(entropy + kl, abs=1e-5)
        assert kl > -1e-5  # the teacher's labels cannot be beaten


def test_every_crop_is_used_before_any_comes_again(images: Path, softlabels: Path, config: Path) -> None:
    options = DataOptions(
        images, batch_size=4, crops_per_image=2, crop_epochs=7, softlabels=softlabels, workers=0,
        preprocessing={"size": 32, "resize": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
    )  # fmt: skip
    data = ImageNetDataModule(options)
    seen: dict[str, list[bytes]] = {}
    assert data.passes == [2, 2, 2, 1]
    for epoch, crops in enumerate(data.passes):
        data.trainer = SimpleNamespace(current_epoch=epoch, global_rank=0, world_size=1)  # type: ignore[assignment]
        for batch in data.train_dataloader():
            for path, views in zip(batch.paths, batch.images.split(crops), strict=True):
                seen.setdefault(path, []).extend(view.numpy().tobytes() for view in views)
    assert len(seen) == 24
    for views in seen.values():
        assert len(set(views[:6])) == 6
        assert views[6] in views[:6]


def test_a_resumed_run_sees_the_crops_that_were_left(config: Path, softlabels: Path, tmp_path: Path) -> None:
    options = ("--save_every", 1)
    whole = run(args(config, tmp_path / "whole", softlabels, *options))
    words = args(config, tmp_path / "two", softlabels, *options)
    with pytest.raises(RuntimeError, match="stopped"):
        interrupt_at_step(8, words)
    rest = run([*words, "--ckpt", "last"])
    ours, theirs = rest.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_partly_built_store_is_used_when_asked_for(
    config: Path, images: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "images", tmp_path / "labels.h5"
    broken, good = with_broken(images, root, "bee/3.png")
    assert make_softlabels(label_options(root, ckpt, out, on_bad_image="skip")) == 0
    words = args(config, tmp_path / "runs", out, "--data.root", root)
    assert "is not finished, 23 of 24 images have labels" in fails(capsys, words)
    assert not (tmp_path / "runs").exists()
    broken.write_bytes(good)  # for calibration
    cli = run([*words, "--data.softlabels_partial", "true"])
    assert cli.datamodule.batches_per_pass() == [6, 3]
    assert len(cli.datamodule.sets.trained()) == 23
    assert not SoftLabels(out).done.all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model.teacher", "deit_tiny_patch16_224"), "data.softlabels and model.teacher both make labels"),
        (("--data.crop_scale", "[0.5,1.0]"), "data.crop_scale is .* but the crops of .*labels.h5 have"),
        (("--data.softlabels", "nowhere.h5"), "no soft labels nowhere.h5: qat make-softlabels makes them"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_anything_is_built(
    config: Path,
    softlabels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    words: str,
) -> None:
    line = fails(capsys, args(config, tmp_path / "runs", softlabels, *more))
    assert re.search(words, line)
    assert not (tmp_path / "runs").exists()


def test_labels_of_other_images_are_refused(
    config: Path, images: Path, softlabels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/train/cat/7.png").unlink()
    line = fails(capsys, args(config, tmp_path, softlabels, "--data.root", tmp_path / "images"))
    assert "first, nothing is here where the labels have 'cat/7.png'" in line


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_an_image_of_another_size_stops_the_run_whatever_is_done_about_bad_ones(
    config: Path, images: Path, softlabels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], on_bad_image: str
) -> None:
    root = tmp_path / "images"
    shutil.copytree(images, root)
    Image.new("RGB", (22, 20)).save(root / "train/bee/2.png")  # not among those that are looked at before
    options = ("--data.root", root, "--data.on_bad_image", on_bad_image, "--data.workers", 1)
    line = fails(capsys, args(config, tmp_path / "runs", softlabels, *options))
    assert "train/bee/2.png: 22 x 20 pixels, but its soft labels were made on 44 x 40" in line


def test_an_evaluation_needs_no_labels(config: Path, ckpt: Path) -> None:
    assert main(["validate", "--config", str(config), "--ckpt", str(ckpt), "--data.softlabels", "nowhere.h5"]) == 0
