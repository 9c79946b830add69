"""The online teacher sees the student's crops in its own size and normalization. Shapes: B crops, S pixels."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.checkpoint import Card
from qat.errors import QatError
from qat.models import build_float, default_preprocessing
from qat.ptq import InitSteps
from qat.recipe import build_recipe
from qat.sites.insert import quantize
from qat.training.teacher import Teacher, build_teacher

ARCH = "test_vit.r160_in1k"  # 160 pixels, mean and deviation 0.5
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model(ARCH).state_dict(), tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


def crops(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, size, size), generator=generator, dtype=torch.uint8)


def seen_by(teacher: Teacher, images: Tensor) -> Tensor:
    """What reaches the model of a teacher."""
    seen = []
    handle = teacher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher(images)
    handle.remove()
    return seen[0]


def test_crops_are_resized_to_the_teachers_size_and_normalized_its_way(weights):
    seen = seen_by(build_teacher(ARCH, weights, 1000), crops(224))
    resized = F.interpolate(crops(224).float(), (160, 160), mode="bicubic", antialias=True).clamp(0, 255)
    assert seen.shape == (2, 3, 160, 160)
    torch.testing.assert_close(seen, (resized / 255 - 0.5) / 0.5)
    assert seen.abs().max() <= 1  # bicubic overshoots, and no image is brighter than white


def test_crops_of_the_teachers_size_are_only_normalized(weights):
    seen = seen_by(build_teacher(ARCH, weights, 1000), crops(160))
    torch.testing.assert_close(seen, (crops(160) / 255 - 0.5) / 0.5)


def test_logits_are_those_of_the_float_model(weights):
    teacher, images = build_teacher(ARCH, weights, 1000), crops(160)
    expected = build_float(ARCH, weights).eval()(default_preprocessing(ARCH).normalize(images))
    logits = teacher(images)
    assert torch.equal(logits, expected.detach())
    assert not logits.requires_grad


def test_it_is_frozen_and_in_evaluation_mode(weights):
    teacher = build_teacher(ARCH, weights, 1000)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.model.training


def test_a_teacher_of_other_classes_is_refused(weights):
    with pytest.raises(QatError, match="knows 1000 classes, the student 10: they must agree"):
        build_teacher(ARCH, weights, 10)


@pytest.fixture(params=["float", "quantized"])
def own_checkpoint(request, tmp_path):
    """A model of ours and the file that holds it."""
    arch = "deit_tiny_patch16_224"
    torch.manual_seed(0)
    model = build_float(arch, None, 10, TINY).eval()
    rules = build_recipe("lsq", w_bits=4, a_bits=4) if request.param == "quantized" else []
    if rules:
        quantize(model, rules)
        InitSteps()(model, [torch.randn(2, 3, 32, 32)])
    preprocessing = default_preprocessing(arch, TINY)
    card = Card(arch, TINY, 10, [rule.to_dict() for rule in rules], preprocessing.to_dict(), [])
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"qat": card.to_dict(), "state_dict": state}, tmp_path / "last.ckpt")
    return model, tmp_path / "last.ckpt"


@torch.no_grad()
def test_one_of_our_checkpoints_teaches_as_it_describes_itself(own_checkpoint):
    model, path = own_checkpoint
    teacher = build_teacher("deit_tiny_patch16_224", path, 10)
    assert teacher.preprocessing == default_preprocessing("deit_tiny_patch16_224", TINY)
    images = crops(32)
    assert torch.equal(teacher(images), model(teacher.preprocessing.normalize(images)))


def test_a_tag_names_weights_and_no_other_architecture(own_checkpoint):
    assert build_teacher("deit_tiny_patch16_224.fb_in1k", own_checkpoint[1], 10).model is not None


def test_weights_that_cannot_be_downloaded_are_given_as_those_of_the_teacher(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("qat.models.build._create", fails)
    with pytest.raises(QatError, match=r"--model\.teacher_checkpoint FILE$") as error:
        build_teacher(ARCH, "pretrained", 1000)
    assert "--model.checkpoint" not in str(error.value)


def test_one_of_our_checkpoints_must_be_of_the_architecture_named(own_checkpoint):
    with pytest.raises(QatError, match=r"model.teacher is deit_small.*last.ckpt is a checkpoint of deit_tiny"):
        build_teacher("deit_small_patch16_224", own_checkpoint[1], 10)
