"""The tracker and the freezing, in real runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qat import checkpoint
from qat.callbacks import IterativeFreezing, OscillationTracker
from qat.cli import lightning_cli
from qat.cli.main import main, run
from qat.errors import QatError
from qat.sites.insert import weight_sites
from qat.training.module import QATModule

STEPS = 50


class Watch(L.Callback):
    """Every code and step after every optimizer step, and what was frozen by then."""

    def __init__(self, freezing: IterativeFreezing) -> None:
        self.freezing = freezing
        self.seen: list[dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, QATModule)
        self.seen.append(
            {
                name: (
                    quantizer.encode(weight.detach()),
                    quantizer.step.detach().clone(),
                    self.freezing._states[name].frozen.clone(),  # type: ignore[attr-defined]
                )
                for name, weight, quantizer in weight_sites(pl_module.model, max_bits=7)
            }
        )


@pytest.fixture(scope="module")
def frozen_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Watch, Path]:
    """60 steps at 2 bits and a high rate, with a low bar for freezing."""
    freezing = IterativeFreezing(freeze_above=0.02, momentum=0.1, log_every=10)
    watch = Watch(freezing)
    with pytest.MonkeyPatch.context() as patch:
        usual = lightning_cli.recorders
        patch.setattr(lightning_cli, "recorders", lambda *args: [freezing, watch, *usual(*args)])
        runs = tmp_path_factory.mktemp("frozen")
        options = {
            "model.w_bits": 2,
            "model.lr": 0.005,
            "model.step_lr": 1e-4,
            "data.crop_epochs": 24,
            "data.batch_size": 8,
        }
        args = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        cli = run(["fit", "--config", str(config), "--runs", str(runs), *args])
    return watch, Path(cli.trainer.default_root_dir)


def test_codes_of_frozen_weights_stay_while_steps_move(frozen_run: tuple[Watch, Path]) -> None:
    seen = frozen_run[0].seen
    first = len(seen) - STEPS - 1
    assert first >= 0
    frozen, moved = 0, 0
    for name, (codes, step, mask) in seen[first].items():
        frozen += int(mask.sum())
        for later in seen[first:]:
            assert torch.equal(later[name][0][mask], codes[mask])
        moved += int(not torch.equal(seen[-1][name][1], step))
    assert frozen > 0
    assert moved == len(seen[first])


def test_the_checkpoint_needs_no_callback(frozen_run: tuple[Watch, Path], images: Path) -> None:
    watch, folder = frozen_run
    model = checkpoint.load(folder / "last.ckpt")
    for name, weight, quantizer in weight_sites(model, max_bits=7):
        assert torch.equal(quantizer.encode(weight.detach()), watch.seen[-1][name][0])
    args = ["validate", "--ckpt", str(folder / "last.ckpt"), "--data.root", str(images), "--data.workers", "0"]
    assert main(args) == 0


def test_the_table_and_the_metrics_of_a_run(config: Path, tmp_path: Path) -> None:
    tracker = ["--trainer.callbacks+", "OscillationTracker", "--trainer.callbacks.log_every", "3"]
    cli = run(["fit", "--config", str(config), "--runs", str(tmp_path), "--model.lr", "0.02", *tracker])
    folder = Path(cli.trainer.default_root_dir)
    rows = {row["site"]: row for row in csv.DictReader((folder / "oscillation.csv").open())}
    sites = weight_sites(cli.model.model)
    assert set(rows) == {site.name for site in sites} | {"low_bit", "8_bit"}
    low = [row for name, row in rows.items() if row["bits"] == "4" and name != "low_bit"]
    assert len(low) == 8
    total = sum(int(row["weights"]) for row in low)
    share = sum(int(row["weights"]) * float(row["share"]) for row in low) / total
    assert int(rows["low_bit"]["weights"]) == total
    assert float(rows["low_bit"]["share"]) == pytest.approx(share)
    assert int(rows["low_bit"]["oscillations"]) == sum(int(row["oscillations"]) for row in low)
    assert rows["low_bit"]["momentum"] == "0.01"
    logged = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["oscillation/low_bit"]]
    assert [row["step"] for row in logged] == ["2", "5", "8"]  # counted from 0, as Lightning does


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (OscillationTracker, {"momentum": 0.0}, "momentum"),
        (OscillationTracker, {"threshold": 1.0}, "threshold"),
        (OscillationTracker, {"every": 0}, "every"),
        (IterativeFreezing, {"freeze_above": 0.0}, "freeze_above"),
        (IterativeFreezing, {"max_bits": 16}, "max_bits"),
    ],
)
def test_bad_options(kind: type[OscillationTracker], options: dict[str, Any], word: str) -> None:
    with pytest.raises(QatError, match=word):
        kind(**options)
