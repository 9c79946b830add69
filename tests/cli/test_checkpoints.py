"""Checkpoints and weights through the command: one line, exit code 2, nothing written, no code run."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qat import build_float
from qat.cli.main import main, run
from tests.conftest import TINY
from tests.own_quantizer import own_quantizer

WEIGHT = "model.blocks.0.norm1.weight"
Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a command that must end with one line and leave nothing behind; returns the line."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        line = capsys.readouterr().err
        assert line.startswith("qat: error: ")
        assert line.count("\n") == 1
        assert list(folder.iterdir()) == []
        return line

    return call


@pytest.fixture
def spoilt(ckpt: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """A copy of the checkpoint of the finished run with something changed."""

    def change(spoil: Callable[[dict[str, Any]], object]) -> Path:
        content = torch.load(ckpt, weights_only=True)
        spoil(content)
        torch.save(content, tmp_path / "spoilt.ckpt")
        return tmp_path / "spoilt.ckpt"

    return change


SPOILT = {  # tests/checkpoint has all kinds; these are one for each part of the reader
    "a weight is missing": (lambda c: c["state_dict"].pop(WEIGHT), "does not fit the model: 1 missing"),
    "a million layers": (lambda c: c["qat"]["model_args"].update(depth=10**6), "model_args.depth is 1000000"),
    "no preprocessing": (lambda c: c["qat"].pop("preprocessing"), "its card lacks 'preprocessing'"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_every_verb_says_the_same(name: str, spoilt: Any, refused: Refused, config: Path, images: Path) -> None:
    path = spoilt(SPOILT[name][0])
    lines = {
        refused("describe", "--ckpt", path),
        refused("validate", "--ckpt", path, "--data.root", images),
        refused("predict", "--ckpt", path, "--data.images", images / "val", "--output", "out.csv"),
        refused("fit", "--config", config, "--ckpt", path, "--runs", "runs"),
        refused("fit", "--config", config, "--model.quant_checkpoint", path, "--runs", "runs"),
        refused("fit", "--config", config, "--model.teacher", "deit_tiny_patch16_224",
                "--model.teacher_checkpoint", path, "--runs", "runs").replace("model.teacher: ", ""),
    }  # fmt: skip
    assert len(lines) == 1
    assert SPOILT[name][1] in lines.pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("pytorch-lightning_version"), "pytorch-lightning_version is None"),
        (lambda c: c.update({"pytorch-lightning_version": 2}), "pytorch-lightning_version is 2"),
        (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "its optimizer has groups of"),
        (lambda c: c.pop("loops"), "lacks 'loops'"),
        (lambda c: c.update(global_step="3"), "global_step is '3'"),
    ],
)
def test_a_run_resumes_from_the_state_of_its_own_parameters(
    spoil: Any, message: str, spoilt: Any, refused: Refused, config: Path
) -> None:
    assert message in refused("fit", "--config", config, "--ckpt", spoilt(spoil), "--runs", "runs")


def test_float_weights_that_are_not_finite_are_named(refused: Refused, config: Path, tmp_path: Path) -> None:
    weights = build_float("deit_tiny_patch16_224", None, 3, TINY).state_dict()
    weights["norm.bias"][5] = math.nan
    torch.save(weights, tmp_path / "nan.pth")
    words = ("--config", config, "--model.checkpoint", tmp_path / "nan.pth", "--runs", "runs")
    assert "nan.pth: 1 of the 24 numbers in 'norm.bias' are not finite" in refused("fit", *words)
    assert "nan.pth: 1 of the 24 numbers in 'norm.bias' are not finite" in refused("validate", *words)


def test_a_key_chooses_among_tables(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = build_float("deit_tiny_patch16_224", None, 3, TINY).state_dict()
    averaged = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": weights, "model_ema": averaged}, tmp_path / "two.pth")
    words = [
        "validate",
        "--config",
        str(config),
        "--model.checkpoint",
        str(tmp_path / "two.pth"),
        "--model.recipe",
        "float",
    ]
    words += ["--model.w_bits", "null", "--model.a_bits", "null"]
    caplog.set_level("INFO")
    assert torch.equal(run(words).model.model.norm.bias.cpu(), averaged["norm.bias"])
    assert any("took 'model_ema' (averaged weights); model.checkpoint_key chooses" in line for line in caplog.messages)
    cli = run([*words, "--model.checkpoint_key", "model"])
    assert torch.equal(cli.model.model.norm.bias.cpu(), weights["norm.bias"])


def test_a_repository_of_the_hub_without_a_network(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    started = time.perf_counter()
    assert "does not answer" in refused("describe", "--model.arch", "hf-hub:timm/no_such_model")
    assert time.perf_counter() - started < 5


def test_a_folder_of_the_hub_is_calibrated_and_its_checkpoint_stands_alone(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "tiny_deit"
    folder.mkdir(parents=True)
    arguments = {name: value for name, value in TINY.items() if name != "img_size"}
    save_file(build_float("deit_tiny_patch16_224", None, 3, TINY).state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "fixed_input_size": True, "num_classes": 3, "classifier": "head"}
    config = {"architecture": "deit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    data = ["--data.root", str(images), "--data.workers", "0"]
    arch = ["--model.arch", f"local-dir:{folder}"]
    recipe = ["--model.recipe", "lsq", "--model.w_bits", "4", "--model.a_bits", "4"]
    calibrated = run(["validate", *arch, *recipe, *data, "--calibration.images", "8", "--runs", str(tmp_path / "runs")])
    (path,) = (tmp_path / "runs" / "tiny_deit").rglob("ptq.ckpt")
    assert run(["validate", "--ckpt", str(path), *arch, *data]).model.card == calibrated.model.card
    shutil.rmtree(folder)
    alone = run(["validate", "--ckpt", str(path), *data])
    assert alone.trainer.callback_metrics["val/loss"] == calibrated.trainer.callback_metrics["val/loss"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A rule for a quantizer outside the package; importing its module leaves the file ``imported`` behind."""
    module = f"mine_{abs(hash(request.node.name))}"
    return {"match": "head.weight_quant", "spec": own_quantizer(tmp_path, monkeypatch, module, bits=5)}


def test_a_checkpoint_runs_no_code_unless_it_is_trusted(
    mine: dict[str, Any], spoilt: Any, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoilt(lambda content: content["qat"]["rules"].append(mine))
    assert "is no part of qat, and importing it would run its code" in refused("describe", "--ckpt", path)
    assert not (tmp_path / "imported").exists()
    assert main(["describe", "--ckpt", str(path), "--trust", "true"]) == 0
    assert (tmp_path / "imported").exists()
    assert "Mine" in capsys.readouterr().out


def test_a_recipe_runs_no_code_unless_it_is_trusted(
    mine: dict[str, Any], refused: Refused, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump([{"recipe": "vvtq"}, mine]))
    words = ["describe", "--config", str(config), "--model.recipe", str(tmp_path / "mine.yaml")]
    assert "--trust" in refused(*words)
    assert not (tmp_path / "imported").exists()
    assert main([*words, "--trust", "true"]) == 0


def test_a_rule_that_is_typed_may_name_any_quantizer(
    mine: dict[str, Any], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["describe", "--config", str(config), f"--model.rules+={yaml.safe_dump(mine, default_flow_style=True)}"])
        == 0
    )
    assert "Mine" in capsys.readouterr().out


def test_a_checkpoint_is_evaluated_with_integers(
    whole: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = ["validate", "--ckpt", str(whole / "last.ckpt"), "--data.root", str(images), "--data.workers", "0"]
    found = []
    for integer in ("false", "true"):
        file = tmp_path / f"{integer}.json"
        assert main([*words, "--integer", integer, "--results_file", str(file)]) == 0
        found.append(json.loads(file.read_text()))
    assert "14 of 14 products multiplied integers, in accumulators of " in caplog.text
    simulated, integer = found
    assert integer["loss"] == pytest.approx(simulated["loss"], rel=1e-4)  # sums are rounded otherwise
    assert integer["products"].keys() == {"integer", "all", "accumulator_bits"}
    assert "products" not in simulated
