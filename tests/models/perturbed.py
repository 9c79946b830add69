"""Small models in which no parameter has a special value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.models import build_float


def perturbed(arch: str, **arguments: Any) -> nn.Module:
    """A float model in evaluation mode whose parameters, zeros and ones among them, are moved a little."""
    torch.manual_seed(0)
    model = build_float(arch, None, 10, arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def two_images(height: int = 32, width: int | None = None) -> Tensor:
    """Two normalized images (2, 3, height, width), square by default."""
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(1))
