"""Post-training quantization as a user runs it: calibrate, validate, load the checkpoint, train from it."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from qat import load
from qat.cli.lightning_cli import QatCLI
from qat.cli.main import main, run
from qat.quantizers import LogSqrt2
from qat.sites.insert import quantizers


def command(config: Path, runs: Path, *words: str, verb: str = "validate", method: str = "RepQViT") -> list[str]:
    """A command on the tiny model, with the recipe of RepQ-ViT unless the words say otherwise."""
    recipe = () if "--model.recipe" in words else ("--model.recipe", "repq_vit")
    return [verb, "--config", str(config), "--runs", str(runs), *recipe, "--calibration.method", method, *words]


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, config: Path) -> QatCLI:
    """A finished `qat validate` with RepQ-ViT."""
    return run(command(config, tmp_path_factory.mktemp("ptq")))


@pytest.fixture(scope="session")
def folder(calibrated: QatCLI) -> Path:
    """The run folder of `calibrated`."""
    return Path(calibrated.trainer.default_root_dir)


def test_the_run_folder_has_a_checkpoint_a_table_and_the_results(folder, calibrated):
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "ptq.ckpt", "quantization.csv", "results.json", "run.lock"}
    results = json.loads((folder / "results.json").read_text())
    assert results["images"] == 12
    assert results["size_mb"] < results["float_size_mb"] / 4
    assert results["calibration"]["method"].startswith("RepQViT(")
    assert results["calibration"]["images"] == 8
    assert results["calibration"]["peak_memory_mb"] > 0
    with (folder / "quantization.csv").open() as file:
        rows = {row["site"]: row for row in csv.DictReader(file)}
    for name, quantizer in quantizers(calibrated.model.model):
        assert float(rows[name]["snr_db"]) == pytest.approx(results["calibration"]["snr_db"][name])
        assert rows[name]["levels"] == str(quantizer.spec.levels)


@torch.no_grad()
def test_the_checkpoint_gives_the_same_logits_to_the_bit(folder, calibrated, fixed_images, images, capsys):
    expected = calibrated.model(fixed_images)
    again = run(["validate", "--ckpt", str(folder / "ptq.ckpt"), "--data.root", str(images)])
    assert torch.equal(again.model(fixed_images), expected)
    model = load(folder / "ptq.ckpt")
    assert torch.equal(model(again.model.preprocessing.normalize(fixed_images)), expected)
    out = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert f"loss {results['loss']:.4f}" in out
    assert "most error (signal to noise): " in out


def test_the_same_seed_gives_the_same_checkpoint_and_another_seed_does_not(config, tmp_path, calibrated):
    expected = calibrated.model.model.state_dict()
    for seed, same in (("0", True), ("5", False)):
        state = run(command(config, tmp_path, "--calibration.seed", seed)).model.model.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in state.items()) == same


@pytest.mark.parametrize("method", ["InitSteps", "Observe", "OutputSearch", "RepQViT"])
def test_no_validation_image_is_seen_before_the_checkpoint_is_saved(method, config, images, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for path in sorted((root / "val").rglob("*.png"))[1:]:  # a folder without any readable image is refused at once
        path.write_text("<html>")
    words = ("--data.root", str(root), "--model.recipe", "uniform")
    assert main(command(config, tmp_path / "runs", *words, method=method)) == 2
    assert "cannot read" in capsys.readouterr().err
    (ckpt,) = (tmp_path / "runs").rglob("ptq.ckpt")
    assert all(quantizer.calibrated for _, quantizer in quantizers(load(ckpt)))


def test_several_devices_are_refused(config, tmp_path, capsys):
    words = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert main(command(config, tmp_path, *words)) == 2
    assert "RepQViT runs on one device, and this run has 2" in capsys.readouterr().err


def test_levels_beyond_the_bits_are_reported_everywhere(config, tmp_path, capsys):
    words = ("--model.recipe", "repq_vit_released", "--results_file", str(tmp_path / "results.json"))
    found = run(command(config, tmp_path, *words)).model.model
    said = "4 bit with 17 levels (more than 4 bits hold)"
    assert said in capsys.readouterr().out
    assert said in json.loads((tmp_path / "results.json").read_text())["recipe"]
    assert sum(isinstance(q.spec, LogSqrt2) for _, q in quantizers(found)) == 2
    assert main(["describe", "--config", str(config), "--model.recipe", "repq_vit_released"]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert " 17 " in out


def test_time_and_memory_are_logged(config, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(command(config, tmp_path))
    assert "MB" in next(message for message in caplog.messages if message.startswith("calibrated "))


def test_training_starts_from_a_calibrated_checkpoint(config, folder, tmp_path, calibrated, fixed_images):
    """The recipe is the same, and nothing is calibrated again."""
    words = ("--model.quant_checkpoint", str(folder / "ptq.ckpt"), "--trainer.max_steps", "2")
    found = run(command(config, tmp_path, *words, verb="fit"))
    assert found.trainer.global_step == 2
    assert found.model.calibration == calibrated.model.calibration
    assert not list(tmp_path.rglob("ptq.ckpt"))
    before, after = calibrated.model.model.state_dict(), found.model.model.state_dict()
    assert not torch.equal(before["blocks.0.attn.qkv.input_quant.step"], after["blocks.0.attn.qkv.input_quant.step"])
    assert torch.equal(  # training leaves zero points
        before["blocks.0.attn.qkv.input_quant.zero_point"], after["blocks.0.attn.qkv.input_quant.zero_point"]
    )


def test_training_calibrates_first(config, tmp_path):
    found = run(command(config, tmp_path, "--trainer.max_steps", "2", verb="fit"))
    assert found.trainer.global_step == 2
    assert found.model.calibration["method"].startswith("RepQViT(")
    (ckpt,) = tmp_path.rglob("ptq.ckpt")
    assert "optimizer_states" not in torch.load(ckpt, weights_only=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.quant_checkpoint", "nowhere.ckpt"), "no checkpoint nowhere.ckpt: --model.quant_checkpoint takes"),
        (
            ("--model.quant_checkpoint", "{ckpt}", "--model.w_bits", "3"),
            "ptq.ckpt holds another model, with Uniform(bits=4",
        ),
        (("--model.recipe", "vvtq"), "FoldNorms needs Uniform, granularity tensor, at 'blocks.0.attn.qkv.input_quant'"),
        (("--model.recipe", "fq_vit_884"), "FoldNorms needs Uniform"),
        (("--model.recipe", "repq"), "no recipe 'repq': choose from"),
        (("--calibration.images", "0"), "calibration.images is 0"),
        (("--calibration.images", "99"), "calibration.images is 99"),
    ],
)
def test_an_impossible_calibration_is_refused_in_one_line(words, message, config, folder, tmp_path, capsys):
    filled = [word.format(ckpt=folder / "ptq.ckpt") for word in words]
    assert main(command(config, tmp_path, *filled, verb="fit")) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
