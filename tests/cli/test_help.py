"""The help of the verbs: what it lists exists, nothing is missing, and what it says of defaults is true."""

from __future__ import annotations

import pytest

from qat.cli.help import COMMON, OF_THE_TRAINER, OF_TRAINING
from qat.cli.main import main
from qat.cli.options import GROUPS, plain_parser
from qat.data.options import DataOptions
from qat.training.options import ModelOptions

VERBS = tuple(COMMON)


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def options(verb: str) -> set[str]:
    dests = {action.dest for action in plain_parser(verb, "").__dict__["_actions"]}
    return {name for name in dests if not name.endswith("help")} - {"print_config", "model.trust", *GROUPS}


def listed(text: str) -> set[str]:
    return {word.removeprefix("--") for line in text.splitlines() for word in line.split()[:3] if word.startswith("--")}


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_lists_options_that_exist_and_the_long_one_all_of_them(verb, capsys):
    short, long = (help_of(capsys, verb, word) for word in ("--help", "--help-all"))
    common = {name for names in COMMON[verb].values() for name in names}
    assert common <= options(verb)
    assert listed(short) >= common | set(OF_THE_TRAINER.get(verb, ()))
    assert listed(long) >= options(verb) - (OF_TRAINING if verb != "fit" else set())
    assert all(len(line) <= 100 for line in short.splitlines() if line.startswith(" " * 30))


def test_defaults_and_ranges_are_those_of_the_options(capsys):
    text = " ".join(help_of(capsys, "fit", "--help-all").split())
    assert f"default {ModelOptions().lr}" in text
    assert f"default {DataOptions().crop_epochs}" in text
    assert "--save_every N optimizer steps between two writes of last.ckpt (at least 1; default 500)" in text
    assert "--data.on_bad_image error|skip" in text
    assert "num_sanity_val_steps" not in text  # qat sets it itself
    assert ":class:" not in text
