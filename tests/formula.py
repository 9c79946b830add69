"""Weights and images by the formula that the logits of the official code were made with (float64)."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import Tensor


def f(n: int, t: int) -> Tensor:
    """Numbers in -1..1 that every machine computes alike."""
    m = torch.arange(n)
    return 2 * ((31 * m * m + 7919 * m + 104729 * t) % 10007).double() / 10007 - 1


def filled(name: str, shape: tuple[int, ...], t: int) -> Tensor:
    """The weight of an official name, whose number among all names is ``t``."""
    values = f(prod(shape), t).view(shape)
    if name.endswith("running_var"):
        return 1 + 0.5 * values
    if "coefficient" in name or (values.ndim == 1 and name.endswith("weight")):
        return 1 + 0.1 * values
    if name.endswith("running_mean"):
        return 0.1 * values
    if values.ndim == 1 or name.endswith(("cls_token", "pos_embed", "bias_table")):
        return 0.02 * values
    return values * sqrt(3 / (values.numel() / len(values)))


def images() -> Tensor:
    """Two images of 224 pixels."""
    return 2 * f(2 * 3 * 224 * 224, 999).view(2, 3, 224, 224)
