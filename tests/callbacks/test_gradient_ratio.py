"""The ratio is that of the two gradients, taken apart by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.callbacks.gradient_ratio import gradient_ratios
from qat.cli.lightning_cli import QatCLI
from qat.cli.main import run
from qat.errors import QatError


@pytest.fixture(scope="module")
def cli(config: Path, tmp_path_factory: pytest.TempPathFactory) -> QatCLI:
    """A run with both regularizers, at its end."""
    regularizers = (
        "[{class_path: BinRegularizer, init_args: {start: 0}}, {class_path: Dampening, init_args: {start: 0}}]"
    )
    args = ["--runs", str(tmp_path_factory.mktemp("ratio")), "--model.regularizers", regularizers]
    return run(["fit", "--config", str(config), "--trainer.max_steps", "2", *args])


def test_ratio_of_norms(cli: QatCLI, fixed_images: torch.Tensor) -> None:
    module = cli.model
    module.total = 2 * module.global_step  # in the middle of the ramp
    losses = {"main": module(fixed_images).square().mean(), **dict(module.penalties.at(module.progress))}
    weights = [site.weight for site in next(iter(module.penalties.regularizers.values())).choose(module.model)]
    norms = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, weights, retain_graph=True)
        norms[name] = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    module.zero_grad()
    sum(losses.values()).backward()
    found = gradient_ratios(module)
    assert found.keys() == {"bin_regularizer", "dampening"}
    for name, ratio in found.items():
        assert ratio == pytest.approx(float(norms[name] / norms["main"]), rel=1e-3)  # main is a difference of float32


def test_nothing_is_computed_before_the_ramp(cli: QatCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cli.model
    for regularizer in module.penalties.regularizers.values():
        monkeypatch.setattr(regularizer, "start", 0.99)
        monkeypatch.setattr(type(regularizer), "penalty", None)  # a call would fail
    module.total = 2 * module.global_step
    assert gradient_ratios(module) == {}


def test_losses_are_logged_by_name(cli: QatCLI) -> None:
    header = (Path(cli.trainer.default_root_dir) / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "train/bin_regularizer", "train/dampening"} <= set(header.split(","))


def test_bad_interval() -> None:
    from qat.callbacks import GradientRatio

    with pytest.raises(QatError, match="every"):
        GradientRatio(every=0)
