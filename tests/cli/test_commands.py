"""Walks through the real command line, good and bad."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from qat import checkpoint
from qat.cli.lightning_cli import QatCLI
from qat.cli.main import main, run
from qat.errors import QatError
from qat.models import build_float
from qat.runs.folder import fresh_folder
from tests.conftest import TINY, write_images


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must fail with one line on stderr and exit code 2, and return the line."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qat: error: ")]
    assert len(lines) == 1
    return lines[0]


class TestFit:
    def test_a_run_leaves_everything_in_its_folder(self, trained: QatCLI, config: Path) -> None:
        folder = Path(trained.trainer.default_root_dir)
        names = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "metrics.csv", "quantization.csv", "last.ckpt"} <= names
        assert any(name.startswith("best_on_val") for name in names)
        assert folder.parent.name == "tiny"
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        assert saved["model"]["preprocessing"]["size"] == 32
        rows = list(csv.DictReader((folder / "quantization.csv").open()))
        assert all(row["calibrated"] == "True" for row in rows if row["quantizer"] != "float")
        assert any(row["train/loss"] for row in csv.DictReader((folder / "metrics.csv").open()))

    def test_a_run_has_as_many_steps_as_its_crop_epochs_say(self, trained: QatCLI) -> None:
        assert trained.trainer.max_epochs == 2  # one pass of 2 crops and one of 1
        assert trained.trainer.global_step == 6 + 3 == trained.model.total

    def test_nothing_is_written_into_the_current_folder(
        self, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Path, images: Path
    ) -> None:
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        monkeypatch.chdir(cwd)
        assert main(["fit", "--config", str(config), "--trainer.max_steps", "1", "--runs", str(tmp_path / "r")]) == 0
        assert main(["validate", "--ckpt", str(ckpt), "--data.root", str(images), "--data.workers", "0"]) == 0
        assert list(cwd.iterdir()) == []

    def test_one_seed_gives_one_result(self, config: Path, tmp_path: Path, trained: QatCLI) -> None:
        again = run(["fit", "--config", str(config), "--runs", str(tmp_path)])
        theirs = trained.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in again.model.state_dict().items())

    def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(
        self, config: Path, tmp_path: Path, trained: QatCLI
    ) -> None:
        first = run(["fit", "--config", str(config), "--runs", str(tmp_path), "--trainer.max_steps", "6"])
        assert first.trainer.global_step == 6
        # the schedule of the short run ended after 6 steps, so only the order of the data can be compared here
        last = Path(first.trainer.default_root_dir) / "last.ckpt"
        resumed = run(["fit", "--config", str(config), "--runs", str(tmp_path), "--name", "two", "--ckpt", str(last)])
        assert resumed.trainer.global_step == trained.trainer.global_step

    def test_a_checkpoint_goes_on_with_its_config_only(
        self, ckpt: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        elsewhere = shutil.copy(ckpt, tmp_path / "last.ckpt")  # away from the config in the folder of its run
        assert "--config" in fails(capsys, "fit", "--ckpt", elsewhere, "--data.root", images)

    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"max_epochs": -1, "max_steps": 4}, 4),
            ({"max_epochs": 1}, 6),
            ({"limit_train_batches": 2}, 2 + 2),
            ({"limit_train_batches": 0.5}, 3 + 1),
            ({"max_epochs": 3, "accumulate_grad_batches": 4}, 2 + 1 + 2),
        ],
        ids=str,
    )
    def test_the_schedule_is_as_long_as_the_run(
        self, options: dict[str, object], steps: int, config: Path, tmp_path: Path
    ) -> None:
        args = [word for name, value in options.items() for word in (f"--trainer.{name}", str(value))]
        cli = run(["fit", "--config", str(config), "--runs", str(tmp_path), *args])
        assert cli.trainer.global_step == cli.model.total == steps

    def test_runs_of_one_second_have_folders_of_their_own(self, tmp_path: Path) -> None:
        folders = [fresh_folder(tmp_path / "runs") for _ in range(3)]
        assert len(set(folders)) == 3
        (tmp_path / "file").touch()
        with pytest.raises(QatError, match="--runs"):
            fresh_folder(tmp_path / "file" / "runs")

    def test_a_checkpoint_of_ours_can_teach(self, config: Path, tmp_path: Path, ckpt: Path) -> None:
        args = ["--model.teacher", "deit_tiny_patch16_224", "--model.teacher_checkpoint", str(ckpt)]
        cli = run(["fit", "--config", str(config), "--runs", str(tmp_path), "--trainer.max_steps", "2", *args])
        assert not any(name.startswith("teacher") for name in cli.model.state_dict())
        trained = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
        assert trained == {id(p) for p in cli.model.parameters()}

    def test_mixed_precision_accumulation_and_clipping(self, config: Path, tmp_path: Path) -> None:
        options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        args = [word for name, value in options.items() for word in (f"--trainer.{name}", str(value))]
        cli = run(["fit", "--config", str(config), "--runs", str(tmp_path), *args])
        assert cli.trainer.global_step == 3 + 2 == cli.model.total  # 6 and 3 batches
        assert all(value.dtype == torch.float32 for value in cli.model.state_dict().values())

    def test_rules_are_appended_on_the_command_line(self, config: Path, tmp_path: Path) -> None:
        rule = '{match: "head.*", spec: null}'
        args = ["--runs", str(tmp_path), "--trainer.max_steps", "1", "--model.rules+", rule]
        cli = run(["fit", "--config", str(config), *args])
        assert not any(name.startswith("model.head") and "quant" in name for name in cli.model.state_dict())

    def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        message = fails(capsys, "fit", "--config", config, "--runs", tmp_path, "--model.lr", "1e30")
        assert "loss is nan at step" in message or "not finite at step" in message

    def test_bad_image_stops_with_its_path_or_is_skipped(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_images(tmp_path / "d/train", 4, seed=0)
        write_images(tmp_path / "d/val", 2, seed=1)
        bad = tmp_path / "d/train/bee/2.png"
        bad.write_bytes(bad.read_bytes()[:200])
        args = ["fit", "--config", config, "--data.root", tmp_path / "d", "--runs", tmp_path / "r"]
        assert "bee/2.png" in fails(capsys, *args, "--calibration.images", "2", "--calibration.seed", "1")
        assert main([*map(str, args), "--data.on_bad_image", "skip"]) == 0


FRESH = """
import sys, torch
from qat.cli.main import run
cli = run(sys.argv[3:])
torch.save(cli.model.eval()(torch.load(sys.argv[1])), sys.argv[2])
"""


class TestValidate:
    def test_a_checkpoint_alone_gives_the_logits_of_the_training_process(
        self, trained: QatCLI, ckpt: Path, images: Path, tmp_path: Path, fixed_images: torch.Tensor
    ) -> None:
        torch.save(fixed_images, tmp_path / "in.pt")
        (tmp_path / "val_only").mkdir()
        (tmp_path / "val_only/val").symlink_to(images / "val")
        (tmp_path / "empty").mkdir()
        verb = ["validate", "--ckpt", str(ckpt), "--data.root", str(tmp_path / "val_only"), "--data.workers", "0"]
        command = [sys.executable, "-c", FRESH, str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), *verb]
        root = str(Path(__file__).parents[2])
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(command, cwd=tmp_path / "empty", env=env, check=True, stdin=subprocess.DEVNULL)
        with torch.no_grad():
            assert torch.equal(trained.model.eval()(fixed_images), torch.load(tmp_path / "out.pt"))

    def test_results_file(self, ckpt: Path, images: Path, tmp_path: Path, trained: QatCLI) -> None:
        out = tmp_path / "out.json"
        args = ["--data.root", str(images), "--data.workers", "0", "--results_file", str(out)]
        assert main(["validate", "--ckpt", str(ckpt), *args]) == 0
        results = json.loads(out.read_text())
        known = {
            "top1",
            "top5",
            "loss",
            "images",
            "seconds",
            "model",
            "recipe",
            "size_mb",
            "float_size_mb",
            "calibration",
        }
        assert set(results) == known
        assert results["images"] == 12
        assert results["model"] == "deit_tiny_patch16_224"
        assert "at 4 bit" in results["recipe"]
        assert results["top1"] == pytest.approx(float(trained.trainer.callback_metrics["val/top1"]))

    def test_metrics_are_exact_over_uneven_batches(self, ckpt: Path, images: Path, tmp_path: Path) -> None:
        found = []
        for batch_size in (5, 12):
            out = tmp_path / f"{batch_size}.json"
            args = ["--data.root", str(images), "--data.val_batch_size", str(batch_size), "--results_file", str(out)]
            assert main(["validate", "--ckpt", str(ckpt), "--data.workers", "0", *args]) == 0
            found.append(json.loads(out.read_text()))
        assert found[0]["top1"] == found[1]["top1"]
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)  # sums of float32 in another order

    def test_without_a_checkpoint_it_calibrates_and_validates(self, config: Path) -> None:
        assert main(["validate", "--config", str(config)]) == 0

    def test_the_config_of_the_checkpoint_is_no_contradiction(self, config: Path, ckpt: Path) -> None:
        assert main(["validate", "--config", str(config), "--ckpt", str(ckpt)]) == 0

    @pytest.mark.parametrize(
        ("option", "value", "word"),
        [
            ("--model.w_bits", "3", "recipe"),
            ("--model.recipe", "lsq", "recipe"),
            ("--model.arch", "vit_tiny_patch16_224", "model.arch"),
            ("--model.num_classes", "7", "model.num_classes"),
            ("--data.preprocessing.resize", "64", "data.preprocessing.resize"),
        ],
    )
    def test_an_option_that_contradicts_the_checkpoint(
        self, option: str, value: str, word: str, ckpt: Path, images: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = fails(capsys, "validate", "--ckpt", ckpt, "--data.root", images, option, value)
        assert word in message
        assert "leave the option out" in message

    @pytest.mark.parametrize(
        "options",
        [("--model.w_bits", "4"), ("--model.recipe", "vvtq"), ("--model.recipe", "vvtq", "--model.a_bits", "4")],
        ids=" ".join,
    )
    def test_an_option_that_repeats_the_checkpoint(self, options: tuple[str, ...], ckpt: Path, images: Path) -> None:
        args = ["--data.root", str(images), "--data.workers", "0", *options]
        assert main(["validate", "--ckpt", str(ckpt), *args]) == 0

    def test_a_results_file_that_cannot_be_written(
        self, ckpt: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ("validate", "--ckpt", ckpt, "--data.root", images, "--results_file")
        assert "cannot be written" in fails(capsys, *args, tmp_path)
        assert "no folder" in fails(capsys, *args, tmp_path / "nowhere" / "out.json")

    def test_images_of_other_classes(self, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_images(tmp_path / "val", 1, seed=0)
        (tmp_path / "val/cat").rename(tmp_path / "val/dog")
        assert "'dog'" in fails(capsys, "validate", "--ckpt", ckpt, "--data.root", tmp_path)


class TestPredict:
    def test_writes_paths_classes_and_probabilities(self, ckpt: Path, images: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.csv"
        args = ["--data.images", str(images / "train"), "--data.workers", "0", "--output", str(out)]
        assert main(["predict", "--ckpt", str(ckpt), *args]) == 0
        rows = list(csv.DictReader(out.open()))
        assert len(rows) == 24
        assert {row["path"] for row in rows} >= {"ant/0.png", "cat/7.png"}
        assert {row["class_1"] for row in rows} <= {"ant", "bee", "cat"}
        assert all(float(row["prob_1"]) >= float(row["prob_2"]) >= float(row["prob_3"]) for row in rows)

    def test_needs_no_data_but_its_images(self, ckpt: Path, images: Path, tmp_path: Path) -> None:
        args = ["--data.images", str(images / "val"), "--output", str(tmp_path / "out.csv"), "--data.workers", "0"]
        assert main(["predict", "--ckpt", str(ckpt), *args]) == 0

    def test_needs_a_place_to_write(self, ckpt: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--output" in fails(capsys, "predict", "--ckpt", ckpt, "--data.images", images)
        assert "/nowhere" in fails(
            capsys, "predict", "--ckpt", ckpt, "--data.images", images, "--output", "/nowhere/x.csv"
        )


class TestDescribe:
    def test_from_a_config_and_from_a_checkpoint(
        self, config: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["describe", "--config", str(config)]) == 0
        planned = capsys.readouterr().out
        assert main(["describe", "--ckpt", str(ckpt), "--full", "true"]) == 0
        trained = capsys.readouterr().out
        assert "blocks.*.attn.probs_quant" in planned
        assert "blocks.1.attn.probs_quant" in trained
        assert "MB" in planned
        assert "bit operations" in planned
        assert " no" in planned
        assert " no" not in trained

    def test_print_config_shows_every_option(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(config), "--print_config"])
        assert stop.value.code in (0, None)
        assert set(yaml.safe_load(capsys.readouterr().out)) >= {"model", "data", "trainer", "calibration", "ckpt"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--model.arhc", "x"], ["--model.arhc"]),
            (["--model.arch", "no_such_model"], ["no_such_model"]),
            (["--model.checkpoint", "nowhere.pth"], ["nowhere.pth", "pretrained"]),
            (["--model.recipe", "lqs"], ["lqs", "lsq", "vvtq"]),
            (["--model.w_bits", "1"], ["w_bits", "2 to 16"]),
            (["--model.recipe", "float"], ["w_bits", "no rule"]),
            (["--model.rules", '[{match: "blocks.*.nothing", spec: null}]'], ["blocks.*.nothing", "nearest"]),
            (["--model.rules", '[{mach: "head.*", spec: null}]'], ["mach", "match"]),
            (["--model.model_args", "{img_sise: 32}"], ["img_sise"]),
            (["--model.lr", "0"], ["model.lr", "above 0"]),
            (["--trainer.accelerator", "gpu"], ["gpu"]),
            (["--data.root", "/nowhere"], ["/nowhere"]),
            (["--data.preprocessing.resise", "300"], ["resise"]),
            (["--data.batch_size", "7"], ["batch_size", "7"]),
            (["--calibration.images", "1000"], ["calibration.images", "24"]),
            (["--calibration.images", "0"], ["calibration.images"]),
            (["--ckpt", "nowhere.ckpt"], ["nowhere.ckpt"]),
            (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
            (["--save_every", "0"], ["--save_every", "0"]),
            (["--model.regularizers+", "NoSuch"], ["regularizers", "NoSuch"]),
            (["--model.regularizers", "[{class_path: BinRegularizer, init_args: {wieght: 1}}]"], ["wieght"]),
            (
                ["--model.regularizers", "[{class_path: BinRegularizer, init_args: {weight: 0}}]"],
                ["weight", "above 0"],
            ),
            (["--model.regularizers", "[{class_path: Dampening, init_args: {sites: x.*}}]"], ["x.*", "describe"]),
            (["--trainer.callbacks+", "OscillationTracker", "--trainer.callbacks.momentum", "2"], ["momentum"]),
            (["--trainer.callbacks+", "EMAWeightAveraging", "--trainer.callbacks.decay", "2"], ["decay"]),
            (
                [
                    "--model.recipe",
                    "float",
                    "--model.w_bits",
                    "null",
                    "--model.a_bits",
                    "null",
                    "--model.compile",
                    "true",
                ],
                ["model.compile"],
            ),
            (
                ["--model.teacher", "deit_tiny_patch16_224", "--model.teacher_checkpoint", "t.pth"],
                ["model.teacher", "t.pth"],
            ),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_is_one_line_that_names_it(
        self, args: list[str], words: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = fails(capsys, "fit", "--config", config, "--runs", tmp_path / "runs", *args)
        assert all(word in message for word in words), message
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_checkpoints_that_are_none(
        self, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ckpt: Path
    ) -> None:
        torn = tmp_path / "torn.ckpt"
        torn.write_bytes(ckpt.read_bytes()[:5000])
        plain = tmp_path / "plain.ckpt"
        torch.save({"state_dict": {}}, plain)
        assert "torn.ckpt" in fails(capsys, "validate", "--ckpt", torn, "--data.root", images)
        assert "model.checkpoint" in fails(capsys, "validate", "--ckpt", plain, "--data.root", images)

    def test_a_quantized_checkpoint_given_as_float_weights(
        self, config: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ("fit", "--config", config, "--model.checkpoint", ckpt, "--runs", tmp_path)
        assert "--ckpt" in fails(capsys, *args)

    def test_a_teacher_of_other_classes(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        weights = tmp_path / "teacher.pth"
        torch.save(build_float("test_vit.r160_in1k", None).state_dict(), weights)
        teacher = ("--model.teacher", "test_vit.r160_in1k", "--model.teacher_checkpoint", weights)
        message = fails(capsys, "fit", "--config", config, "--runs", tmp_path, *teacher)
        assert "1000 classes" in message

    def test_float_weights_with_another_head(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights = tmp_path / "float.pth"
        torch.save(build_float("deit_tiny_patch16_224", None, 7, TINY).state_dict(), weights)
        args = ("fit", "--config", config, "--runs", tmp_path, "--model.checkpoint", weights)
        assert "fresh_head" in fails(capsys, *args)
        assert main([str(a) for a in (*args, "--model.fresh_head", "true", "--trainer.max_steps", "1")]) == 0


class TestLoad:
    def test_a_notebook_loads_a_checkpoint_in_one_line(
        self, trained: QatCLI, ckpt: Path, fixed_images: torch.Tensor
    ) -> None:
        model = checkpoint.load(ckpt)
        normal = trained.model.preprocessing.normalize(fixed_images)
        with torch.no_grad():
            assert torch.equal(model(normal), trained.model.eval()(fixed_images))

    def test_weights_of_another_model_are_refused(self, ckpt: Path, tmp_path: Path) -> None:
        content = torch.load(ckpt, weights_only=True)
        content["qat"]["format"] = 99
        torch.save(content, tmp_path / "new.ckpt")
        with pytest.raises(QatError, match="format 99"):
            checkpoint.read(tmp_path / "new.ckpt")


def test_images_must_be_images(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train/ant/0.png")
    assert "val" in fails(capsys, "fit", "--config", config, "--data.root", tmp_path)
