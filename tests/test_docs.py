"""What README and configs promise works as written."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qat.cli.main import main
from qat.models import build_float
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ranges import Range, check_fields
from qat.recipe import build_recipe
from qat.sites.insert import quantize, quantizers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CALIBRATION = (ROOT / "docs/ptq.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [line for line in COMMANDS if line.startswith("qat ") and not line.startswith("qat describe")]
BITS = ("--model.w_bits", "4", "--model.a_bits", "4")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
WHOLE = [config for config in CONFIGS if config.parent.name != "base"]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 6
    save_file(build_float("deit_tiny_patch16_224", None).state_dict(), tmp_path / "deit_tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(example, names)
    assert torch.isfinite(names["logits"]).all()
    assert len(list(quantizers(names["model"]))) == 148


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_parse(command: str, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = ["--runs", str(ckpt.parents[2])] if "--ckpt last" in command else []
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], *runs, "--print_config"])
    assert stop.value.code in (0, None)


@pytest.mark.parametrize("config", WHOLE, ids=lambda path: path.stem)
def test_every_config_can_be_described(config: Path) -> None:
    added = ["--config", str(ROOT / "configs/deit_t_w4a4.yaml")] if config.parent.name == "add" else []
    text = config.read_text()
    by_flags = ("recipe: vvtq" in text or "recipe: frontier" in text) and "  w_bits:" not in text
    assert main(["describe", *added, "--config", str(config), *(BITS if by_flags else ())]) == 0


def test_what_configs_have_in_common_is_written_once() -> None:
    """The nine configs of VVTQ differ from their base in nothing but the widths."""
    for config in CONFIGS:
        if re.fullmatch(r"(deit|swin|sret)_t_w\da\d", config.stem) and config.parent.name == "configs":
            content = yaml.safe_load(config.read_text())
            bits = int(config.stem[-1])
            assert content == {"base": f"base/{config.stem[:-5]}.yaml", "model": {"w_bits": bits, "a_bits": bits}}


def test_what_is_added_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    files = [ROOT / "configs/deit_t_w4a4.yaml", *sorted((ROOT / "configs/add").glob("*.yaml"))]
    with pytest.raises(SystemExit):
        main(["fit", *(word for file in files for word in ("--config", str(file))), "--print_config"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("OscillationTracker", "WeightAverage", "BinRegularizer"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_how_to_run_it(config: Path) -> None:
    assert "qat " in "".join(config.read_text().splitlines(keepends=True)[:5])


def test_the_list_of_steps_in_the_docs_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(r"```yaml\n(# qat calibrate .*?)```", CALIBRATION, re.S)
    mine = tmp_path / "mine.yaml"
    mine.write_text(text, encoding="utf-8")
    frontier = str(ROOT / "configs/ptq/frontier.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--config", frontier, "--config", str(mine), "--print_config"])
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)["calibration"]["method"]["init_args"]["list"]
    names = [step["class_path"].rpartition(".")[2] for step in printed]
    assert names[:2] == ["FoldNorms", "TensorSearch"]
    assert names[2:] == ["ChooseSoftmax", "OutputSearch", "Ridge", "GPTQ", "BiasCorrection"]


def test_the_step_in_the_docs_fills_a_model() -> None:
    """Annotations of the class are read when it is built, so the names that it uses are those of this module."""
    (example,) = re.findall(r"```python\n(@dataclass.*?)```", CALIBRATION, re.S)
    names: dict[str, Any] = {
        "__name__": __name__, "dataclass": dataclass, "Annotated": Annotated, "Range": Range,
        "check_fields": check_fields, "Step": Step, "Stage": Stage, "UnitWork": UnitWork,
    }  # fmt: skip
    exec(example, names)
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    model = build_float("deit_tiny_patch16_224", None, 10, small).eval()
    quantize(model, build_recipe("uniform", w_bits=4, a_bits=4))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names["Deviations"](count=2.0)(model, [images])
    step = model.get_submodule("patch_embed.proj.input_quant").step.detach()
    assert step.item() == pytest.approx(4 * float(images.std()) / 255, rel=0.02)  # 2 deviations to each side, 8 bits
