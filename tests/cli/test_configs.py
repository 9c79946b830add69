"""Configs that start from others, and class paths of older runs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qat.cli.configs import given_configs, with_bases
from qat.cli.main import main
from qat.cli.run_of_ckpt import Origin
from qat.errors import QatError
from tests.cli.test_commands import fails


def write(path: Path, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def test_bases_come_before_the_config_that_names_them(tmp_path: Path) -> None:
    far = write(tmp_path / "base/far.yaml")
    near = write(tmp_path / "base/near.yaml", base="far.yaml")
    other = write(tmp_path / "other.yaml")
    top = write(tmp_path / "top.yaml", base=["base/near.yaml", "other.yaml"])
    words = ["--config", str(top), "--model.lr", "1", f"--config={other}"]
    expected = [word for path in (far, near, other, top) for word in ("--config", str(path))]
    found = [str(Path(word).resolve()) if word.endswith("yaml") else word for word in with_bases(words)]
    assert found == [*expected, "--model.lr", "1", "--config", str(other)]
    assert given_configs(words) == [str(top), str(other)]


def test_what_a_config_says_wins_over_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "base.yaml", model={"arch": "deit_tiny_patch16_224", "lr": 0.1}, data={"crop_epochs": 7})
    top = write(tmp_path / "top.yaml", base="base.yaml", model={"lr": 0.2})
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(top), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["arch"], printed["model"]["lr"], printed["data"]["crop_epochs"]) == (
        "deit_tiny_patch16_224",
        0.2,
        7,
    )


def test_a_base_that_is_missing_or_circular_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = write(tmp_path / "lost.yaml", base="nowhere.yaml")
    assert f"config {lost}: there is no base {tmp_path / 'nowhere.yaml'}" in fails(capsys, "fit", "--config", lost)
    one = write(tmp_path / "one.yaml", base="two.yaml")
    write(tmp_path / "two.yaml", base="one.yaml")
    assert "is its own base" in fails(capsys, "describe", "--config", one)
    loop = write(tmp_path / "sub/loop.yaml", base="../sub/loop.yaml")
    assert "is its own base" in fails(capsys, "fit", "--config", loop)
    for wrong in (3, [1], {"a": "b"}):
        assert "base is" in fails(capsys, "fit", "--config", write(tmp_path / "wrong.yaml", base=wrong))
    with pytest.raises(QatError, match="base stands inside a config"):
        with_bases(["--base", str(one)])
    with pytest.raises(QatError, match="--conf is short for --config"):
        with_bases(["--conf", str(one)])


def test_class_paths_of_older_runs_are_read(tmp_path: Path) -> None:
    model = {"arch": "deit_tiny_patch16_224", "recipe": "lsq", "w_bits": 4, "a_bits": 4}
    model["regularizers"] = [{"class_path": "qat.regularizers.BinRegularizer", "init_args": {"weight": 0.5}}]
    assert main(["describe", "--config", str(write(tmp_path / "old.yaml", model=model))]) == 0


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("day: 2024-99-99", []),
        ("[" * 3000, []),
        ("data: {root: hfds/some/set, class_map: no/such.txt, workers: -1, val_batch_size: many, classes: [a]}", []),
        ("data: {root: no/such/folder, val_labels: 3, workers: 2}", ["--data.workers=2"]),
        ("data: {root: HERE, val_batch_size: 5, classes: folders}",
         ["--data.root=HERE", "--data.val_batch_size=5", "--data.classes=folders"]),
    ],
)  # fmt: skip
def test_a_config_beside_a_checkpoint_gives_only_what_can_be_used(text: str, taken: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text.replace("HERE", str(tmp_path)))
    words = Origin(tmp_path / "last.ckpt", False, tmp_path / "config.yaml").arguments("validate", ["--trust=false"])
    assert words == [*(word.replace("HERE", str(tmp_path)) for word in taken), "--trust=false"]


def test_importing_the_module_that_python_starts_runs_nothing() -> None:
    importlib.import_module("qat.__main__")
    answer = subprocess.run([sys.executable, "-m", "qat", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("qat ")
