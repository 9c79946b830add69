"""Families through the real command, small: train on stored labels with the regularizer on, resume, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qat
from qat.cli.main import main, run
from qat.training.module import QATModule
from qat.training.options import ModelOptions
from tests.conftest import interrupt_at_step

SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4]}
SRET = {"img_size": 32, "embed_dims": [12, 24], "depths": [1, 2], "num_heads": [2, 4], "groups": [[4, 2], [2, 1]]}
TOKENS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
MEMBERS = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "sret": ("sret_tiny", SRET),
    "dinov2": ("vit_giant_patch14_reg4_dinov2", TOKENS),
    "dinov3": ("vit_small_plus_patch16_dinov3_qkvb", TOKENS),
}
STAGED = ("swin", "sret")


def words(config: Path, runs: Path, softlabels: Path, family: str, bits: int, **more: Any) -> list[str]:
    arch, model_args = MEMBERS[family]
    options = {
        "config": config, "runs": runs, "data.softlabels": softlabels, "model.arch": arch,
        "model.model_args": model_args, "model.w_bits": bits, "model.a_bits": bits, "model.drop_path": 0.2,
        "model.regularizers": [{"class_path": "BinRegularizer", "init_args": {"start": 0.0}}],
    }  # fmt: skip
    return ["fit", *(word for name, value in (options | more).items() for word in (f"--{name}", str(value)))]


@pytest.mark.parametrize(
    ("family", "bits"), [*((family, bits) for family in STAGED for bits in (2, 3, 4)), ("dinov2", 4), ("dinov3", 4)]
)
def test_a_family_trains_and_is_evaluated(
    family: str, bits: int, config: Path, softlabels: Path, images: Path, tmp_path: Path
) -> None:
    cli = run(words(config, tmp_path, softlabels, family, bits))
    last = Path(cli.trainer.default_root_dir) / "last.ckpt"
    assert cli.trainer.global_step == 6 + 3
    assert "train/kl" in cli.trainer.callback_metrics
    assert cli.trainer.callback_metrics["train/bin_regularizer"] > 0
    assert main(["validate", "--ckpt", str(last), "--data.root", str(images), "--trainer.accelerator", "cpu"]) == 0
    reread = qat.load(last)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(reread(pixels), cli.model.model.eval()(pixels))


@pytest.mark.parametrize("family", STAGED)
def test_a_run_that_stops_and_resumes_ends_with_the_same_bits(
    family: str, config: Path, softlabels: Path, tmp_path: Path
) -> None:
    """Shuffled groups and drop path are functions of the step; batch statistics are in the checkpoint."""
    average = [{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.5}}]
    common = {"trainer.callbacks": average, "save_every": 1}
    whole = run(words(config, tmp_path / "whole", softlabels, family, 2, **common))
    stopped = words(config, tmp_path / "stopped", softlabels, family, 2, **common)
    with pytest.raises(RuntimeError, match="stopped"):
        interrupt_at_step(4, stopped)
    rest = run([*stopped, "--ckpt", "last"])
    ours, theirs = rest.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_an_average_leaves_integers_alone() -> None:
    module = QATModule(ModelOptions(arch=MEMBERS["swin"][0], model_args=SWIN, checkpoint=None, num_classes=3))
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(module)
    index = "model.layers.0.blocks.0.attn.relative_position_index"
    assert torch.equal(average.module.get_buffer(index), module.get_buffer(index))  # 0.9999 * 11 + 0.0001 * 11 < 11
