"""The tiny DeiT of the GPU tests, and images for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat import build_float, build_recipe, quantize
from qat.ptq import InitSteps, PTQMethod
from tests.conftest import TINY

ARCH = "deit_tiny_patch16_224"


def pixels(count: int = 8, seed: int = 0) -> Tensor:
    """Normalized images (count, 3, 32, 32) on the CPU, the same on every machine."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def float_model() -> nn.Module:
    """Random weights, the same in every call."""
    torch.manual_seed(0)
    return build_float(ARCH, None, 3, TINY).eval()


def quantized(recipe: str, bits: int = 8, method: PTQMethod | None = None) -> nn.Module:
    """A model that was calibrated on the CPU, so that its steps do not depend on the device."""
    model = quantize(float_model(), build_recipe(recipe, w_bits=bits, a_bits=bits))
    (method or InitSteps())(model, [pixels()])
    return model
