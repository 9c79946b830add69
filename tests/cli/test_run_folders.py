"""What `--ckpt` means, what lies in the folder of a run, and finished runs that are made longer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from qat.cli.main import main, run
from qat.runs.lock import FolderLock
from tests.cli.runs import entries
from tests.conftest import write_images

CPU = ("--trainer.accelerator", "cpu")


def folder_of(runs: Path) -> Path:
    (folder,) = {path.parent for path in runs.glob("*/*/config.yaml")}
    return folder


class TestALongerRun:
    """The first run has 3 crops of every image: a pass of two and a pass of one."""

    @pytest.fixture(scope="class")
    @staticmethod
    def short(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The runs folder of a finished run, on images of its own."""
        root = tmp_path_factory.mktemp("short")
        write_images(root / "images/train", 8, seed=0)
        write_images(root / "images/val", 2, seed=1)
        args = ["--config", str(config), "--data.root", str(root / "images"), "--runs", str(root / "runs")]
        assert run(["fit", *args]).trainer.global_step == 6 + 3
        return root

    def test_with_passes_of_other_crops(self, short: Path, config: Path, tmp_path: Path) -> None:
        shutil.copytree(short / "runs", tmp_path / "runs")
        args = ["--config", str(config), "--data.root", str(short / "images"), "--runs", str(tmp_path / "runs")]
        cli = run(["fit", *args, "--ckpt", "last", "--data.crop_epochs", "6"])  # three crops are left: two passes more
        assert cli.trainer.global_step == cli.model.total == 9 + 6 + 3
        assert [row["step"] for row in entries(folder_of(tmp_path / "runs"))][-1] == "17"

    def test_with_another_batch_and_one_image_less(self, short: Path, config: Path, tmp_path: Path) -> None:
        shutil.copytree(short, tmp_path / "short")
        (tmp_path / "short/images/train/bee/3.png").unlink()
        args = ["--config", str(config), "--data.root", str(tmp_path / "short/images")]
        args += ["--runs", str(tmp_path / "short/runs"), "--data.batch_size", "16", "--data.crop_epochs", "6"]
        cli = run(["fit", *args, "--ckpt", "last"])
        assert cli.trainer.global_step == cli.model.total == 9 + 3 + 2  # 23 images in batches of 8, then of 16
        last = torch.load(folder_of(tmp_path / "short/runs") / "last.ckpt", weights_only=True)
        rates = [row["lr"] for row in entries(folder_of(tmp_path / "short/runs")) if "lr" in row]
        assert len(rates) == last["global_step"] == 14
        assert float(rates[-1]) > 0  # the cosine ends after the last step, and not before


class TestCkpt:
    @pytest.fixture(scope="class")
    @staticmethod
    def runs(config: Path, tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
        """The runs folder of a run that was started with paths relative to the folder where it lies."""
        place = tmp_path_factory.mktemp("place")
        (place / "images").symlink_to(images)
        args = ["--config", str(config), "--data.root", "images", "--runs", "runs", "--trainer.max_steps", "2"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            run(["fit", *args])
        return place / "runs"

    def test_a_folder_is_enough_to_resume_anywhere(
        self, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(runs, tmp_path / "runs")
        folder = folder_of(tmp_path / "runs")
        monkeypatch.chdir(tmp_path)
        cli = run(["fit", "--ckpt", str(folder.relative_to(tmp_path)), "--trainer.max_steps", "4"])
        assert cli.trainer.global_step == 4
        cli = run(
            ["fit", "--ckpt", "last", "--trainer.max_steps", "-1"]
        )  # the newest of all runs, with its last config
        assert cli.trainer.global_step == 9
        assert Path(cli.trainer.default_root_dir).resolve() == folder.resolve()
        assert len(list(folder.glob("best*"))) == 1  # the folder was moved, and an earlier one is replaced all the same
        assert {path.name for path in folder.glob("*.yaml")} == {"config.yaml", "config_2.yaml", "config_3.yaml"}

    @pytest.mark.parametrize("ckpt", ["last", "folder", "file"])
    def test_other_verbs_find_model_and_images(
        self, ckpt: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder = folder_of(runs)
        word = {"last": "last", "folder": str(folder), "file": str(folder / "last.ckpt")}[ckpt]
        args = ["--ckpt", word, "--runs", str(runs)]
        assert main(["validate", *args, *CPU]) == 0
        assert main(["predict", *args, *CPU, "--output", "out.csv"]) == 0
        assert main(["describe", *args]) == 0

    def test_a_folder_that_is_none_of_a_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for words in (["--ckpt", str(tmp_path)], ["--ckpt", "last", "--runs", str(tmp_path)]):
            for verb in ("fit", "validate", "describe"):
                assert main([verb, *words]) == 2
                assert str(tmp_path) in capsys.readouterr().err

    def test_a_refused_resume_leaves_no_config(self, runs: Path, tmp_path: Path) -> None:
        shutil.copytree(runs, tmp_path / "runs")
        words = ["fit", "--ckpt", str(folder_of(tmp_path / "runs")), "--data.batch_size", "16"]
        assert main(words) == 2  # in the middle of a pass
        assert [path.name for path in folder_of(tmp_path / "runs").glob("*.yaml")] == ["config.yaml"]

    def test_the_saved_paths_are_absolute(self, runs: Path) -> None:
        saved = yaml.safe_load((folder_of(runs) / "config.yaml").read_text())
        assert Path(saved["data"]["root"]).is_absolute()


def test_a_resumed_run_saves_recipe_and_weights_as_they_were_given(config: Path, tmp_path: Path) -> None:
    args = ["--runs", str(tmp_path), "--trainer.max_steps"]
    run(["fit", "--config", str(config), *args, "2"])
    run(["fit", "--ckpt", "last", *args, "3"])
    run(["fit", "--ckpt", "last", *args, "4"])  # from config_2.yaml
    first, *others = (yaml.safe_load((folder_of(tmp_path) / f"config{n}.yaml").read_text()) for n in ("", "_2", "_3"))
    for saved in others:
        assert saved["model"] == first["model"]
        assert saved["model"]["recipe"] == "vvtq"
    cli = run(["fit", "--config", str(folder_of(tmp_path) / "config_3.yaml"), "--ckpt", "null"])  # and begins a new one
    assert cli.trainer.global_step == 4
    assert cli.calibrates


OTHER = "{class_path: CSVLogger, init_args: {save_dir: DIR}}"


@pytest.mark.parametrize("logger", ["false", "CSVLogger", OTHER, f"[{OTHER}]"])
def test_other_loggers_change_nothing_about_the_folder(logger: str, config: Path, tmp_path: Path) -> None:
    args = ["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), "--trainer.max_steps", "2"]
    args += ["--trainer.logger", logger.replace("DIR", str(tmp_path / "elsewhere"))]
    run(args)
    folder = folder_of(tmp_path / "runs")
    names = {"config.yaml", "last.ckpt", "metrics.csv", "quantization.csv"}
    assert names <= {path.name for path in folder.iterdir()}
    assert bool(list(tmp_path.glob("elsewhere/**/metrics.csv"))) == ("DIR" in logger)
    assert bool(list(folder.glob("*/**/metrics.csv"))) == (logger == "CSVLogger")  # beside ours, in the same folder
    cli = run([*args, "--ckpt", "last", "--trainer.max_steps", "4"])
    assert Path(cli.trainer.default_root_dir) == folder
    assert len([row for row in entries(folder) if "train/loss" in row]) == 4


def test_a_folder_has_one_writer(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", str(config), "--runs", str(tmp_path), "--trainer.max_steps", "2"]
    run(args)
    (folder_of(tmp_path) / "last.ckpt.123.part").touch()  # of a process that was killed
    lock = FolderLock(folder_of(tmp_path))
    assert main([*args, "--ckpt", "last"]) == 2
    assert "is being written by process" in capsys.readouterr().err
    lock.release()
    assert main([*args, "--ckpt", "last"]) == 0
    assert not list(folder_of(tmp_path).glob("*.part"))
