"""`qat calibrate` as a user runs it: on training images alone or on any images, with an evaluation and without."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import qat.ptq
from qat import load
from qat.cli.lightning_cli import QatCLI
from qat.cli.main import main, run
from qat.cli.wishes import WISHES
from qat.data.imagenet import ImageNetDataModule
from qat.ptq import InitSteps, RepQViT
from qat.ptq.unit_store import UnitStore
from qat.quantizers.named import spec_from_dict
from qat.sites.insert import quantizers
from qat.training.module import QATModule
from tests.cli.runs import ROOT
from tests.conftest import CLASSES, TINY

SITE = "blocks.1.mlp.fc2.input_quant"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config without a place of images: the tiny model, RepQ-ViT on 8 images."""
    path = tmp_path_factory.mktemp("recipe") / "ptq.yaml"
    model = {"arch": "deit_tiny_patch16_224", "model_args": TINY, "checkpoint": None}
    calibration = {"method": {"class_path": "RepQViT"}, "images": 8, "batch_size": 4}
    path.write_text(
        yaml.safe_dump(
            {
                "model": {**model, "recipe": "repq_vit", "w_bits": 4, "a_bits": 4},
                "trainer": {"accelerator": "cpu"},
                "data": {"workers": 0},
                "calibration": calibration,
            }
        )
    )
    return path


@pytest.fixture
def train_only(images: Path, tmp_path: Path) -> Path:
    """A root without validation images."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train").symlink_to(images / "train")
    return tmp_path / "root"


@pytest.fixture
def loose(images: Path, tmp_path: Path) -> Path:
    """The training images without their classes: some in the folder itself, others in one below it."""
    folder = tmp_path / "loose"
    (folder / "more").mkdir(parents=True)
    for name in CLASSES:
        for path in (images / "train" / name).iterdir():
            (folder / ("more" if name == "cat" else "") / f"{name}{path.name}").symlink_to(path)
    return folder


def command(recipe: Path, runs: Path, *words: object) -> list[str]:
    return ["calibrate", "--config", str(recipe), "--runs", str(runs), *map(str, words)]


def folder_of(runs: Path) -> Path:
    (folder,) = {path.parent for path in runs.rglob("ptq.ckpt")}
    return folder


def written(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "results.json").read_text())
    return found


def pixels(image: torch.Tensor) -> bytes:
    return image.numpy().tobytes()


def same(mine: QatCLI, theirs: QatCLI) -> bool:
    states = [cli.model.model.state_dict() for cli in (mine, theirs)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_training_images_alone_are_enough(recipe, train_only, tmp_path, capsys, caplog, images, fixed_images):
    with caplog.at_level(logging.INFO):
        cli = run(command(recipe, tmp_path / "runs", "--data.root", train_only))
    assert f"no validation images (data.root is {train_only})" in caplog.text
    assert cli.trainer.world_size == 1
    folder = folder_of(tmp_path / "runs")
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "ptq.ckpt", "quantization.csv", "results.json", "run.lock"
    }  # fmt: skip
    results = written(folder)
    assert not {"top1", "top5", "loss", "images", "seconds"} & results.keys()
    assert results["calibration"]["images"] == 8
    assert results["calibration"]["peak_memory_mb"] > 0
    with (folder / "quantization.csv").open() as file:
        errors = {row["site"]: float(row["snr_db"]) for row in csv.DictReader(file) if row["snr_db"]}
    assert errors == pytest.approx(results["calibration"]["snr_db"])
    how, size, worst, saved, validate, fit, export = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"calibrated by RepQViT on 8 images in \d+\.\d s, peak memory \d+ MB", how)
    assert "MB with weights packed at their width" in size
    assert worst.count("dB") == 3
    assert saved == f"checkpoint: {folder / 'ptq.ckpt'}"
    assert validate == f"next: qat validate --ckpt {folder / 'ptq.ckpt'} --data.root DIR"
    command_of_fit = f"next: qat fit --config {recipe} --model.quant_checkpoint {folder / 'ptq.ckpt'} --data.root DIR"
    assert fit == f"{command_of_fit} --trainer.max_steps 800 --model.lr 2e-05 --model.step_lr 1e-05"
    assert export == f"next: qat export --ckpt {folder / 'ptq.ckpt'} --format onnx --output {folder / 'ptq.onnx'}"
    again = run(shlex.split(validate.replace("DIR", str(images)))[2:])
    with torch.no_grad():
        assert torch.equal(again.model(fixed_images), cli.model(fixed_images))
    trained = shlex.split(fit.replace("DIR", str(images)))[2:]
    assert main([*trained, "--runs", str(tmp_path / "fit"), "--trainer.max_steps", "1"]) == 0


def test_a_calibration_that_is_evaluated_is_that_of_validate(recipe, images, tmp_path, capsys):
    file = tmp_path / "copy.json"
    cli = run(command(recipe, tmp_path / "runs", "--data.root", images, "--results_file", file))
    out = capsys.readouterr().out
    results = written(folder_of(tmp_path / "runs"))
    assert results == json.loads(file.read_text())
    assert f"top-1 {results['top1']:.2f} %" in out
    assert "next: qat predict --ckpt" in out
    words = command(recipe, tmp_path / "theirs", "--data.root", images)[1:]
    assert same(cli, run(["validate", *words]))
    theirs = written(folder_of(tmp_path / "theirs"))
    assert results.keys() == theirs.keys()
    assert {key: results[key] for key in ("top1", "loss", "images")} == {
        key: theirs[key] for key in ("top1", "loss", "images")
    }


def test_no_validation_image_is_looked_at_where_that_is_said(recipe, images, tmp_path, capsys):
    (tmp_path / "root/val/ant").mkdir(parents=True)
    (tmp_path / "root/train").symlink_to(images / "train")
    (tmp_path / "root/val/ant/0.png").write_text("<html>")
    words = command(recipe, tmp_path / "runs", "--data.root", tmp_path / "root")
    assert main([*words]) == 2
    assert "none of the 1 images of" in capsys.readouterr().err
    assert main([*words, "--validate", "false"]) == 0
    assert "top1" not in written(folder_of(tmp_path / "runs"))


@pytest.mark.parametrize("kind", ["aiqvit", "is_vit", "adalog", "ptq4vit"])
def test_every_kind_of_quantizer_is_trained_and_read_back(kind, recipe, images, tmp_path):
    """Calibrated, trained for two steps, resumed for one more, and loaded: with the parameters that it has."""
    words = ("--data.root", images, "--model.recipe", kind, "--calibration.method", "TensorSearch")
    calibrated = run(command(recipe, tmp_path / "runs", *words, "--name", "ptq", "--validate", "false"))
    folder = folder_of(tmp_path / "runs")
    common = ["--config", str(recipe), "--data.root", str(images), "--model.recipe", kind, "--runs", str(tmp_path)]
    start = ["--model.quant_checkpoint", str(folder / "ptq.ckpt"), "--data.global_batch_size", "4", "--name", "fit"]
    run(["fit", *common, *start, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"])
    (ckpt,) = tmp_path.glob("fit/*/last.ckpt")
    trained = run(["fit", "--ckpt", str(ckpt.parent), "--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"])
    model = load(ckpt)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.model.model.state_dict().items())
    before = calibrated.model.model.state_dict()
    learned = {name for name, _ in model.named_parameters() if "probs_quant" in name}
    assert any(not torch.equal(before[name], trained.model.model.state_dict()[name]) for name in learned)


def test_any_folder_of_images_will_do(recipe, loose, train_only, images, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.linear_gradient("L").save(loose / "turned.png", exif=exif)
    cli = run(command(recipe, tmp_path / "runs", "--data.images", loose))
    assert cli.model.card.num_classes == 1000  # of the model, as nothing says otherwise
    assert all(q.calibrated for _, q in quantizers(load(folder_of(tmp_path / "runs") / "ptq.ckpt")))
    (batch,) = cli.datamodule.calibration_batches(25, 25, 0)
    predicted = torch.cat([found.images for found in cli.datamodule.predict_dataloader()])
    assert sorted(map(pixels, batch)) == sorted(map(pixels, predicted))  # `qat predict` turns images upright too
    (tmp_path / "root/val").symlink_to(images / "val")
    both = run(command(recipe, tmp_path / "both", "--data.images", loose, "--data.root", tmp_path / "root"))
    assert both.model.card.classes == list(CLASSES)
    assert written(folder_of(tmp_path / "both"))["images"] == 12
    assert (tmp_path / "root/train").readlink().name == "train"
    (tmp_path / "root/train").unlink()  # it is not needed then
    alone = run(command(recipe, tmp_path / "alone", "--data.images", loose, "--data.root", tmp_path / "root"))
    assert same(both, alone)


def test_images_that_cannot_be_read_stop_it_or_are_skipped(recipe, loose, tmp_path, capsys):
    for path in sorted(loose.glob("*.png"))[:5]:
        path.unlink()
        path.write_text("<html>")
    words = ("--data.images", loose, "--calibration.images", "24")
    assert main(command(recipe, tmp_path / "runs", *words)) == 2
    assert "cannot read" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))
    assert main(command(recipe, tmp_path / "runs", *words, "--data.on_bad_image", "skip")) == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("owner", "hook", "kept"),
    [(ImageNetDataModule, "calibration_batches", False), (QATModule, "validation_step", True)],
)
def test_a_signal(owner, hook, kept, signum, recipe, images, tmp_path, monkeypatch, capsys):
    """In the calibration nothing is left; a checkpoint that is complete is kept."""
    original = getattr(owner, hook)

    def act(*args, **kwargs):
        os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, hook, act)
    assert main(command(recipe, tmp_path / "runs", "--data.root", images)) == 128 + signum
    assert capsys.readouterr().err.endswith(f"qat: stopped by {signum.name}\n")
    assert bool(list(tmp_path.rglob("ptq.ckpt"))) is kept
    assert not list(tmp_path.rglob("results.json"))
    assert bool(list(tmp_path.glob("runs/*/*"))) is kept


def stop_after_two_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell this process to stop when its first calibration has kept two units."""
    saved, save = itertools.count(1), UnitStore.save

    def stop(self, here):
        save(self, here)
        if next(saved) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(UnitStore, "save", stop)


@pytest.mark.parametrize("word", ["last", "folder"])
def test_a_calibration_that_was_stopped_goes_on(word, recipe, images, tmp_path, monkeypatch, capsys):
    words = command(recipe, tmp_path / "runs", "--data.root", images)
    assert main([*words, "--name", "whole"]) == 0
    stop_after_two_units(monkeypatch)
    assert main([*words, "--name", "stopped"]) == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "runs/stopped").iterdir()
    line = f"qat: stopped by SIGTERM after 2 finished units; the same command with --resume {folder} goes on"
    assert capsys.readouterr().err.splitlines()[-1] == line
    again = ["--resume", "last" if word == "last" else str(folder)]
    assert main([*words, "--name", "stopped", *again, "--calibration.seed", "1"]) == 2
    assert "is of another calibration: its seed is 0, and here 1" in capsys.readouterr().err
    shutil.copytree(images, tmp_path / "others")
    assert main([*words, "--name", "stopped", *again, "--data.root", str(tmp_path / "others")]) == 2
    assert "is of another calibration: its place is" in capsys.readouterr().err
    assert main([*words, "--name", "stopped", *again, "--seed_everything", "7"]) == 2  # the weights are random
    assert "its weights are another one; give the same options" in capsys.readouterr().err
    if word == "last":  # nothing else is needed: the folder has the config
        assert main(["calibrate", "--resume", "last", "--runs", str(tmp_path / "runs"), "--name", "stopped"]) == 0
    else:
        assert main([*words, "--name", "stopped", *again]) == 0
    assert not (folder / "units").exists()
    (whole,) = (tmp_path / "runs/whole").glob("*/ptq.ckpt")
    contents = [torch.load(path, weights_only=True)["state_dict"] for path in (whole, folder / "ptq.ckpt")]
    assert contents[0].keys() == contents[1].keys()
    assert all(torch.equal(value, contents[1][name]) for name, value in contents[0].items())
    assert main([*words, "--name", "stopped", *again]) == 2
    assert f"the calibration of {folder} has ended: give {folder / 'ptq.ckpt'} as --ckpt" in capsys.readouterr().err
    assert main(["validate", "--ckpt", "last", "--runs", str(tmp_path / "runs"), "--data.root", str(images)]) == 0


def test_a_training_that_was_stopped_while_it_calibrated_goes_on(recipe, images, tmp_path, monkeypatch, capsys):
    runs = ("--runs", str(tmp_path / "runs"))
    words = ["fit", "--config", str(recipe), *runs, "--data.root", str(images), "--trainer.max_steps", "2",
             "--data.global_batch_size", "4"]  # fmt: skip
    whole = run([*words, "--name", "whole"])
    stop_after_two_units(monkeypatch)
    assert main([*words, "--name", "stopped"]) == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "runs/stopped").iterdir()
    assert f"the same command with --resume {folder} goes on" in capsys.readouterr().err
    assert main(["fit", "--ckpt", "last", *runs, "--name", "stopped"]) == 2
    assert f"it was calibrating: --resume {folder} in place of --ckpt goes on" in capsys.readouterr().err
    assert main(["fit", "--ckpt", "last", "--resume", "last", *runs, "--name", "stopped"]) == 2
    assert "leave one out" in capsys.readouterr().err
    again = run(["fit", "--resume", "last", *runs, "--name", "stopped"])
    assert again.trainer.global_step == 2
    assert again.trainer.default_root_dir == str(folder) or Path(again.trainer.default_root_dir) == folder
    assert same(whole, again)


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Lets RepQ-ViT put 6 bits in place of 4 at one site, and tell about it; returns the spec."""
    original = RepQViT.calibrate
    spec: dict[str, object] = {}

    def calibrate(self, model, batches):
        original(self, model, batches)
        before = model.get_submodule(SITE)
        stored = before.spec.to_dict()
        spec.update(stored | {"init_args": stored["init_args"] | {"bits": 6}})
        parent, _, name = SITE.rpartition(".")
        setattr(model.get_submodule(parent), name, spec_from_dict(spec).build(before.layout))
        InitSteps()(model, batches)
        self.chosen, self.report = {SITE: dict(spec)}, {"gain_db": 1.5}

    monkeypatch.setattr(RepQViT, "calibrate", calibrate)
    return spec


def test_what_a_method_has_chosen_goes_with_the_checkpoint(choosing, recipe, images, tmp_path, capsys, fixed_images):
    cli = run(command(recipe, tmp_path / "runs", "--data.root", images))
    assert "chosen: Uniform(bits=6, " in capsys.readouterr().out
    folder = folder_of(tmp_path / "runs")
    assert cli.model.card.rules[-1] == {"match": SITE, "spec": choosing}
    for stored in (written(folder), torch.load(folder / "ptq.ckpt", weights_only=True)["qat"]):
        assert stored["calibration"]["chosen"] == {SITE: choosing}
        assert stored["calibration"]["report"] == {"gain_db": 1.5}
    loaded = load(folder / "ptq.ckpt").get_submodule(SITE)
    assert loaded.spec.bits == 6
    config = ("--config", str(recipe), "--data.root", str(images))  # the recipe does not contradict the checkpoint
    again = run(["validate", "--ckpt", str(folder / "ptq.ckpt"), *config])
    with torch.no_grad():
        assert torch.equal(again.model(fixed_images), cli.model(fixed_images))


def test_layers_that_a_method_leaves_in_floating_point_are_told(recipe, images, tmp_path, capsys, fixed_images):
    options = ("--calibration.method", "AIQViT", "--calibration.method.iterations", "2", "--calibration.method.batch",
               "4", "--calibration.method.rank", "2", "--calibration.method.mode", "side", "--model.recipe", "aiqvit",
               "--model.w_bits", "3", "--model.a_bits", "3")  # fmt: skip
    cli = run([*command(recipe, tmp_path / "runs", "--data.root", images), *options])
    assert "chosen: floating point at patch_embed.proj.weight_quant, blocks.0" in capsys.readouterr().out
    model = load(folder_of(tmp_path / "runs") / "ptq.ckpt")
    with torch.no_grad():
        assert torch.equal(model(fixed_images.float()), cli.model.model(fixed_images.float()))


@pytest.mark.parametrize("calibrates", [True, False])
def test_training_goes_on_from_what_was_chosen(calibrates, choosing, recipe, images, tmp_path, capsys):
    words = ["--config", str(recipe), "--data.root", str(images), "--data.batch_size", "8", "--runs", str(tmp_path)]
    start = []
    if not calibrates:
        run(["calibrate", *words, "--validate", "false"])
        start = ["--model.quant_checkpoint", str(folder_of(tmp_path) / "ptq.ckpt")]
    first = run(["fit", *words, *start, "--name", "fit", "--trainer.max_steps", "1"])
    assert resolve_bits(first) == 6
    resumed = run(["fit", "--ckpt", "last", "--runs", str(tmp_path), "--name", "fit", "--trainer.max_steps", "2"])
    assert resumed.trainer.global_step == 2
    assert resolve_bits(resumed) == 6
    if not calibrates:
        other = [*words, *start, "--model.w_bits", "3"]
        assert main(["fit", *other]) == 2
        assert "holds another model, with Uniform(bits=4" in capsys.readouterr().err


def resolve_bits(cli: QatCLI) -> int:
    bits: int = cli.model.model.get_submodule(SITE).spec.bits
    return bits


REFUSED = """
--data.root ROOT --ckpt x.ckpt                  | --ckpt is x.ckpt, a checkpoint of qat, and qat calibrate starts from
--data.root ROOT --model.quant_checkpoint x.ckpt | --model.quant_checkpoint is x.ckpt, a checkpoint of qat
--data.root ROOT --model.recipe float --model.w_bits null --model.a_bits null | model.recipe is float, which quantizes
--data.root ROOT --calibration.images 25        | calibration.images is 25: ROOT/train has 24, choose 1..24
--data.images LOOSE --calibration.images 25     | calibration.images is 25: LOOSE has 24, choose 1..24
                                                | data.root is not set: give the folder with train/<class>/*.JPEG, or
--data.images ROOT/nowhere                      | ROOT/nowhere is not a folder
--data.root ROOT/nowhere                        | data.root ROOT/nowhere is not a folder
--data.root ROOT --validate true                | data.root ROOT has no 'val' folder
--data.images LOOSE --validate true             | data.root is not set
--data.root ROOT --trainer.devices 2            | RepQViT runs on one device, and this run has 2
"""


@pytest.mark.parametrize("row", REFUSED.strip("\n").splitlines(), ids=lambda row: row.split(" | ")[0].strip())
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    row, recipe, train_only, loose, tmp_path, monkeypatch, capsys
):
    words, _, said = row.replace("ROOT", str(train_only)).replace("LOOSE", str(loose)).rpartition(" | ")
    monkeypatch.setattr(QATModule, "__init__", None)  # weights are not read
    assert main(command(recipe, tmp_path / "runs", *shlex.split(words))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.strip() in line
    assert not (tmp_path / "runs").exists()


class TestWishes:
    """The table of methods, which the help and docs/ptq.md show."""

    def test_the_help_and_the_documentation_show_the_same_table(self, capsys):
        assert main(["calibrate", "--help"]) == 0
        shown = capsys.readouterr().out
        rows = (ROOT / "docs/ptq.md").read_text(encoding="utf-8").splitlines()
        for wish in WISHES:
            (row,) = (row for row in rows if row.startswith(f"| {wish.wish} |"))
            assert f"`{wish.method}`" in row
            assert wish.recipe in row
            assert f"`{wish.say}`" in row
            assert re.search(rf"{wish.wish} +{re.escape(wish.say)}\n", shown)

    @pytest.mark.parametrize("wish", WISHES, ids=lambda wish: wish.wish)
    def test_what_is_said_has_the_method_and_the_recipe(self, wish):
        assert wish.method in qat.ptq.__all__
        option, value = wish.say.split()
        if option == "--config":
            content = yaml.safe_load((ROOT / value).read_text())
            assert content["calibration"]["method"]["class_path"] == wish.method
            assert content["model"]["recipe"] == wish.recipe
        else:
            assert (option, value) == ("--calibration.method", wish.method)
