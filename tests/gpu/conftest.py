"""Tests of what only a GPU shows: devices, pinned memory, waits, and the arithmetic of CUDA.

    pytest -m gpu        on a machine with a CUDA device

Most bodies run on the CPU as well, where they prove little but keep working. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.cli.lightning_cli import QatCLI
from qat.cli.main import run

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
Fit = Callable[..., QatCLI]


def all_on_gpu_last_on_cpu(name: str, values: Sequence[Any], **options: Any) -> pytest.MarkDecorator:
    """Parametrize ``name`` and the fixture ``device``: all values on the GPU, and the last one also on the CPU."""
    cases = [pytest.param("cuda", value, marks=pytest.mark.gpu) for value in values]
    return pytest.mark.parametrize(("device", name), [*cases, ("cpu", values[-1])], indirect=["device"], **options)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds no CUDA device here"))


@pytest.fixture(params=[CUDA, "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, then the CPU."""
    return torch.device(request.param)


@pytest.fixture(params=[CUDA])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, for what a CPU does not have."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _modes_are_put_back() -> Iterator[None]:
    """Let no test leave torch in a mode that it asked for: deterministic, or one in which a wait is an error."""
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def fit(config: Path, device: torch.device, tmp_path: Path) -> Fit:
    """Run `qat fit` with the tiny config on the device; returns what it built."""

    def call(*words: object) -> QatCLI:
        return run(fit_words(config, device, tmp_path, *words))

    return call


def fit_words(config: Path, device: torch.device, runs: Path, *more: object) -> list[str]:
    """The command line of a run on one device."""
    return ["fit", "--config", str(config), *on(device), "--runs", str(runs), *map(str, more)]


def on(device: torch.device) -> list[str]:
    """The options that choose a device."""
    return ["--trainer.accelerator", {"cuda": "gpu", "cpu": "cpu"}[device.type], "--trainer.devices", "1"]
