"""An online teacher: any float timm model that sees the student's crops in its own way. B crops, C classes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.build import build_float, default_preprocessing


class Teacher(nn.Module):
    """Frozen; resizes and normalises on the device with its own size, interpolation, mean and deviation.

    Args:
        arch: timm model name.
        checkpoint: ``pretrained`` or a local file.
        num_classes: classes of the student; QatError when the teacher has others.
    """

    def __init__(self, arch: str, checkpoint: str | Path, num_classes: int) -> None:
        super().__init__()
        self.preprocessing = default_preprocessing(arch)
        self.model = build_float(arch, checkpoint).eval().requires_grad_(False)
        classes = int(self.model.num_classes)  # type: ignore[arg-type]
        if classes != num_classes:
            raise QatError(f"model.teacher {arch} knows {classes} classes, the student {num_classes}: they must agree")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of uint8 crops (B, 3, S, S)."""
        size, mode = self.preprocessing.size, self.preprocessing.interpolation
        if images.shape[-1] != size:
            smooth = mode != "nearest"
            images = F.interpolate(images.float(), (size, size), mode=mode, antialias=smooth).clamp_(0, 255)
        logits: Tensor = self.model(self.preprocessing.normalize(images))
        return logits
