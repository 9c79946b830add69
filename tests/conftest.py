"""A tiny real world: images of coloured squares, a tiny DeiT, and a trained run of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.cli.lightning_cli import QatCLI
from qat.cli.main import run
from qat.training.module import QATModule
from tools.make_softlabels import main as make_softlabels

# one thread per worker: two workers with two threads each on two cores wait for each other most of the time
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
CLASSES = ("ant", "bee", "cat")


def write_images(split: Path, per_class: int, seed: int) -> None:
    """Noisy squares whose colour tells the class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        folder = split / name
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 120, (40, 44, 3))
            pixels[..., label] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-folder tree with 3 classes, 24 training and 12 validation images."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 8, seed=0)
    write_images(root / "val", 4, seed=1)
    return root


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The config of a run of 6 steps on one core, W4A4."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
trainer: {{accelerator: cpu, devices: 1, log_every_n_steps: 1}}
model:
  arch: deit_tiny_patch16_224
  model_args: {TINY}
  checkpoint: null
  recipe: vvtq
  w_bits: 4
  a_bits: 4
  lr: 1.0e-3
data: {{root: {images}, batch_size: 8, crops_per_image: 2, crop_epochs: 3, workers: 0}}
calibration: {{images: 8, batch_size: 4}}
"""
    )
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, config: Path) -> QatCLI:
    """A finished run: its module, its trainer, its folder."""
    return run(["fit", "--config", str(config), "--runs", str(tmp_path_factory.mktemp("runs"))])


@pytest.fixture(scope="session")
def ckpt(trained: QatCLI) -> Path:
    """The last checkpoint of the finished run."""
    return Path(trained.trainer.default_root_dir) / "last.ckpt"


@pytest.fixture(scope="session")
def softlabels(images: Path, ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Soft labels of 6 crops of every training image, made by the finished run, as `label_options` says."""
    out = tmp_path_factory.mktemp("labels") / "labels.h5"
    assert make_softlabels(label_options(images, ckpt, out)) == 0
    return out


def label_options(images: Path, ckpt: Path, labels: Path, /, **changes: object) -> list[str]:
    """The command line that makes `softlabels`, or one that differs."""
    options = {
        "data.root": images, "teacher": "deit_tiny_patch16_224", "teacher_checkpoint": ckpt, "out": labels, "crops": 6,
        "topk": 2, "batch_size": 12, "workers": 0, "accelerator": "cpu", "devices": 1,
    }  # fmt: skip
    return [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))]


def with_broken(images: Path, root: Path, name: str) -> tuple[Path, bytes]:
    """A copy of the tree at ``root`` in which one training image is none: its path, and what it was."""
    shutil.copytree(images, root)
    broken = root / "train" / name
    good = broken.read_bytes()
    broken.write_text("<html>")
    return broken, good


@pytest.fixture
def fixed_images() -> torch.Tensor:
    """uint8 images (5, 3, 32, 32)."""
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def interrupt_at_step(step: int, words: list[str]) -> None:
    """Run a command until an error in the middle of its work."""
    original = QATModule.training_step

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if self.global_step == step:
            raise RuntimeError("stopped")
        return original(self, batch, batch_idx)

    QATModule.training_step = training_step  # type: ignore[method-assign]
    try:
        run(words)
    finally:
        QATModule.training_step = original  # type: ignore[method-assign]
