"""A teacher that labels the student's crops during training. Shapes: B crops, S pixels, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat import checkpoint as checkpoints
from qat.errors import QatError
from qat.models import build_float, default_preprocessing
from qat.models.arch import find_architecture, without_tag
from qat.preprocessing import Preprocessing


class Teacher(nn.Module):
    """A frozen model that resizes and normalizes crops on the device, as its own preprocessing says.

    Args:
        model: any classifier with an attribute ``num_classes``.
        preprocessing: what the teacher was trained with.
        num_classes: classes of the student; QatError when the teacher has others.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, num_classes: int) -> None:
        super().__init__()
        self.model, self.preprocessing = model.eval().requires_grad_(False), preprocessing
        classes = int(model.num_classes)  # type: ignore[arg-type]
        if classes != num_classes:
            raise QatError(f"the teacher knows {classes} classes, the student {num_classes}: they must agree")

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Return itself: a weight average copies the student, and the teacher is frozen."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of uint8 crops (B, 3, S, S)."""
        size, mode = self.preprocessing.size, self.preprocessing.interpolation
        if images.shape[-1] != size:
            smooth = mode != "nearest"
            images = F.interpolate(images.float(), (size, size), mode=mode, antialias=smooth).clamp_(0, 255)
        logits: Tensor = self.model(self.preprocessing.normalize(images))
        return logits


def build_teacher(
    arch: str,
    weights: str | Path,
    num_classes: int,
    classes: Sequence[str] | None = None,
    option: str = "model.teacher",
    trust: bool = False,
) -> Teacher:
    """A teacher from timm, or from a checkpoint of ours, float or quantized.

    Args:
        arch: timm model name.
        weights: ``pretrained``, a local file of float weights, or a checkpoint that `qat fit` wrote.
        num_classes: classes of the student; QatError when the teacher has another number.
        classes: their names; QatError when a checkpoint of ours has others, or the same in another order.
        option: the name of ``arch`` in errors.
        trust: quantizers that a checkpoint of ours names by a dotted path may be imported.
    """
    try:
        card = checkpoints.find_card(weights, trust)
        if card is None:
            return Teacher(build_float(arch, weights), default_preprocessing(arch), num_classes)
        model = checkpoints.load(weights, trust)
    except QatError as error:
        text = str(error).replace(", or --model.checkpoint null for random weights", "")
        raise QatError(f"{option}: {text.replace('--model.checkpoint', f'--{option}_checkpoint')}") from None
    if without_tag(card.arch) != without_tag(find_architecture(arch).name):
        raise QatError(f"{option} is {arch}, but {weights} is a checkpoint of {card.arch}")
    if card.classes and classes and card.classes != list(classes):
        raise QatError(f"{option}: {weights} was trained on other classes, first {card.classes[:2]}, not {classes[:2]}")
    return Teacher(model, Preprocessing(**card.preprocessing), num_classes)
