"""A calibrated tiny DeiT and the checkpoint that describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat import build_float, build_recipe, calibrate, quantize
from qat.checkpoint import Card
from qat.models import default_preprocessing

ARCH = "deit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def make(rules: list[Any] | None = None, classes: int = 3) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what its checkpoint holds."""
    torch.manual_seed(0)
    model = build_float(ARCH, None, classes, TINY).eval()
    table = build_recipe("vvtq", rules or [], w_bits=4, a_bits=4)
    calibrate(quantize(model, table), [torch.randn(2, 3, 32, 32)])
    names = [f"class {i}" for i in range(classes)]
    plain = default_preprocessing(ARCH, TINY).to_dict()
    card = Card(ARCH, dict(TINY), classes, [rule.to_dict() for rule in table], plain, names)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return model, {"pytorch-lightning_version": "2.6.0", "qat": card.to_dict(), "state_dict": state}


def write(content: Any, path: Path) -> Path:
    """Save a content and return its path."""
    torch.save(content, path)
    return path
