"""What a command imports before it does anything: counted, because seconds depend on the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import sys
from qat.cli import main
try:
    main(sys.argv[2:])
except SystemExit:
    pass
print(*(name for name in sys.argv[1].split(",") if name in sys.modules), file=sys.stderr)
"""
HEAVY = "torch,torchvision,timm,lightning,torchmetrics,h5py,jsonargparse,numpy,yaml,rich"


def loaded(*words: str) -> set[str]:
    """Those of the heavy packages that a command has imported by its end."""
    done = subprocess.run([sys.executable, "-c", COUNT, HEAVY, *words], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["fitt"]], ids=str)
def test_without_a_verb_nothing_heavy_is_imported(words: list[str]) -> None:
    assert loaded(*words) == set()


def test_the_help_of_a_verb_needs_neither_lightning_nor_timm() -> None:
    assert not loaded("fit", "--help") & {"lightning", "torchmetrics", "timm", "torchvision"}


def test_describe_needs_no_lightning() -> None:
    words = ("--model.arch", "deit_tiny_patch16_224", "--model.recipe", "lsq", "--model.w_bits", "4")
    assert not loaded("describe", *words, "--model.a_bits", "4") & {"lightning", "torchmetrics"}
