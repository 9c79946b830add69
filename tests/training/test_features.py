"""Distillation of features: the loss by hand, what is refused, and training with it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from qat.callbacks import Calibrate
from qat.checkpoint import Card
from qat.errors import QatError
from qat.models import build_float, default_preprocessing
from qat.ptq import Frontier
from qat.ptq.options import CalibrationOptions
from qat.ptq.rotate_residual import REPORT
from qat.sites.insert import quantizers
from qat.training.features import FeatureLoss, FeatureOptions, relative_error
from qat.training.module import QATModule
from tests.conftest import TINY
from tests.training.runs import ARCH, fit, tiny_data, tiny_module, tiny_trainer

BLOCKS = ("blocks.0", "blocks.1")


@pytest.fixture
def teacher(tmp_path: Path) -> dict[str, Any]:
    """Options of a float teacher of the size of the student."""
    torch.manual_seed(1)
    model = build_float(ARCH, None, 3, TINY)
    card = Card(ARCH, TINY, 3, [], default_preprocessing(ARCH, TINY).to_dict(), [])
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"qat": card.to_dict(), "state_dict": state}, tmp_path / "teacher.ckpt")
    return {"teacher": ARCH, "teacher_checkpoint": str(tmp_path / "teacher.ckpt")}


def test_the_error_is_relative_to_the_variance_of_each_channel():
    target = torch.tensor([[1.0, 10.0], [3.0, 10.0]])  # means 2 and 10, so that the mean square is (1 + 1) / 4
    assert float(relative_error(target + 1, target)) == pytest.approx(1 / 0.5)
    means = target.mean(0).expand_as(target)
    assert float(relative_error(means, target)) == pytest.approx(1), "as good as a constant"
    assert float(relative_error(100 * target + 100, 100 * target)) == pytest.approx(2)
    assert torch.isfinite(relative_error(torch.ones(2, 2), torch.zeros(2, 2)))


def test_what_was_seen_is_forgotten():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    loss = FeatureLoss(FeatureOptions(("0", "1"), weight=3.0), net, net)
    x = torch.randn(5, 3)
    with loss.watching_teacher():
        net(x)
    with loss.watching_student():
        net(x + 0.1)
    assert float(loss.take()["features"]) > 0
    with pytest.raises(QatError, match="'0' has not run in the student"):
        loss.take()
    net(x)
    assert not net[0]._forward_hooks


def test_without_options_there_is_none():
    loss = FeatureLoss(None, nn.Linear(2, 2), nn.Linear(2, 2))
    with loss.watching_student(), loss.watching_teacher():
        pass
    assert loss.take() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "modules is empty"),
        ({"modules": ["a"], "teacher_modules": ["a", "b"]}, "has 2 names, and modules 1"),
        ({"modules": ["a"], "weight": 0.0}, "weight is 0.0"),
    ],
)
def test_options_are_refused(options, message):
    with pytest.raises(QatError, match=f"model.features.*{message}"):
        FeatureOptions(**options)


def test_a_module_that_is_not_there_is_named_with_the_nearest(teacher):
    with pytest.raises(QatError, match=r"there is no module 'block.1'; the nearest is 'blocks.1'"):
        tiny_module(features=FeatureOptions(["block.1"]), **teacher)
    with pytest.raises(QatError, match=r"teacher_modules: there is no module 'blocks.7'; the nearest is 'blocks.\d'"):
        tiny_module(features=FeatureOptions(["blocks.1"], ["blocks.7"]), **teacher)


def test_it_needs_a_teacher():
    with pytest.raises(QatError, match=r"model\.features needs a teacher"):
        tiny_module(features=FeatureOptions(BLOCKS))


def test_other_shapes_are_said_before_anything_is_calibrated(teacher):
    with pytest.raises(QatError, match=r"'blocks.0' gives \(1, 17, 24\) and 'patch_embed.proj' of the teacher"):
        tiny_module(features=FeatureOptions(["blocks.0"], ["patch_embed.proj"]), **teacher)


def test_the_check_leaves_the_model_as_it_was(teacher):
    plain, checked = tiny_module(), tiny_module(features=FeatureOptions(BLOCKS), **teacher)
    assert plain.model.training == checked.model.training
    assert all(q.enabled for _, q in quantizers(checked.model))
    with pytest.raises(QatError, match="has not run in the student"):
        checked.features.take()


def trained(features: FeatureOptions | None, teacher: dict[str, Any], images: Path, folder: Path) -> QATModule:
    torch.manual_seed(0)
    module = tiny_module(features=features, lr=1e-3, w_bits=8, a_bits=8, **teacher)
    fit(module, images, folder, max_steps=12)
    return module


def test_training_with_it_brings_blocks_nearer_to_the_teacher(teacher, images, tmp_path, fixed_images):
    errors = []
    for features in (None, FeatureOptions(BLOCKS, weight=5.0)):
        module = trained(features, teacher, images, tmp_path).eval()
        loss = FeatureLoss(FeatureOptions(BLOCKS), module.model, module.teacher[0].model)
        pixels = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        with torch.no_grad(), loss.watching_teacher(), loss.watching_student():
            module.teacher[0](pixels)
            module(pixels)
        errors.append(float(loss.take()["features"]))
    assert errors[1] < 0.9 * errors[0]


def test_its_value_is_logged(teacher, images, tmp_path):
    module = tiny_module(features=FeatureOptions(BLOCKS), **teacher)
    trainer = fit(module, images, tmp_path, max_steps=2, log_every_n_steps=1)
    assert float(trainer.logged_metrics["train/features"]) > 0


def frontier_run(teacher: dict[str, Any], images: Path, folder: Path, **options: Any) -> tuple[QATModule, L.Trainer]:
    """A step with features, at 8 bits, from a calibration that rotates the residual stream."""
    module = tiny_module(
        recipe="frontier", w_bits=8, a_bits=8, features=FeatureOptions(BLOCKS), lr=1e-9, **teacher, **options
    )
    calibrate = Calibrate(CalibrationOptions(Frontier(rounds=1, rows=34), images=8, batch_size=8), folder)
    callbacks = [] if options else [calibrate]
    trainer = tiny_trainer(folder, callbacks, max_steps=1, log_every_n_steps=1)
    trainer.fit(module, datamodule=tiny_data(images))
    return module, trainer


def test_a_teacher_follows_a_student_whose_residual_stream_is_rotated(teacher, images, tmp_path, fixed_images):
    """Only with weights that are those of the teacher can features be almost equal."""
    start = {"checkpoint": teacher["teacher_checkpoint"]}
    plain = tiny_module(**teacher).teacher[0]
    module, trainer = frontier_run({**teacher, **start}, images, tmp_path)
    assert module.calibration["report"] == {REPORT: 0}
    assert float(trainer.logged_metrics["train/features"]) < 0.01
    with torch.no_grad():
        torch.testing.assert_close(module.teacher[0](fixed_images), plain(fixed_images), rtol=1e-4, atol=1e-5)
    again, trainer = frontier_run(teacher, images, tmp_path / "again", quant_checkpoint=tmp_path / "ptq.ckpt")
    assert again.calibration["report"] == {REPORT: 0}
    assert float(trainer.logged_metrics["train/features"]) < 0.01


def test_a_teacher_that_cannot_follow_is_refused():
    loss = FeatureLoss(FeatureOptions(["0"]), nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity()))
    loss.follow({}, nn.Sequential(nn.Identity()))
    with pytest.raises(QatError, match="and that of the teacher cannot follow: Sequential is not a model family"):
        loss.follow({"report": {REPORT: 0}}, nn.Sequential(nn.Identity()))
    with pytest.raises(QatError, match="and that of the teacher is quantized: take a teacher in floating point"):
        loss.follow({"report": {REPORT: 0}}, tiny_module().model)
