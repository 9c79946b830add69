"""A run with everything that has a state, for the tests of stopping and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.cli.main import run
from tests.conftest import TINY


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run with everything that has a state: average, tracker, drop path, accumulation, validations within a pass."""
    path = tmp_path_factory.mktemp("config") / "all.yaml"
    path.write_text(
        f"""
save_every: 2
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 24
  log_every_n_steps: 1
  accumulate_grad_batches: 2
  check_val_every_n_epoch: null
  val_check_interval: 8
  callbacks:
    - {{class_path: EMAWeightAveraging, init_args: {{decay: 0.9}}}}
    - {{class_path: OscillationTracker, init_args: {{log_every: 3}}}}
    - {{class_path: GradientRatio, init_args: {{every: 4}}}}
model:
  arch: deit_tiny_patch16_224
  model_args: {TINY}
  checkpoint: null
  drop_path: 0.3
  recipe: vvtq
  w_bits: 2
  a_bits: 3
  lr: 3.0e-3
  regularizers: [{{class_path: BinRegularizer, init_args: {{start: 0.1}}}}]
data: {{root: {images}, batch_size: 4, crops_per_image: 2, crop_epochs: 8, workers: 0}}
calibration: {{images: 8, batch_size: 4}}
"""
    )
    return path


@pytest.fixture(scope="session")
def whole(everything: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the uninterrupted run: 4 passes of 12 batches, 24 optimizer steps."""
    cli = run(["fit", "--config", str(everything), "--runs", str(tmp_path_factory.mktemp("whole"))])
    assert cli.trainer.global_step == 24
    return Path(cli.trainer.default_root_dir)
