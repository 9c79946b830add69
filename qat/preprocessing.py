"""What happens to an image before a model sees it. Shapes: B images, S pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.errors import QatError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation transform and normalization of one model.

    Args:
        size: side of the square input, pixels.
        resize: length the short side is resized to before the centre crop, pixels.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        mean, std: per RGB channel, for values in 0..1.
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise QatError(f"preprocessing.interpolation is {self.interpolation!r}: choose from {INTERPOLATIONS}")
        if not 0 < self.size <= self.resize:
            raise QatError(f"preprocessing: size {self.size} must be positive and at most resize {self.resize}")
        for name in ("mean", "std"):
            value = tuple(float(v) for v in getattr(self, name))
            if len(value) != 3:
                raise QatError(f"preprocessing.{name} is {value}: three numbers are needed, one per RGB channel")
            object.__setattr__(self, name, value)

    def override(self, values: Mapping[str, Any]) -> Preprocessing:
        """The same with some values replaced; ``None`` keeps a value, an unknown name is an error."""
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(values) - known):
            raise QatError(f"preprocessing has no {unknown[0]!r}: choose from {sorted(known)}")
        given = {name: value for name, value in values.items() if value is not None}
        if "size" in given and "resize" not in given:  # keep the model's ratio of crop to resize
            given["resize"] = round(given["size"] * self.resize / self.size)
        return Preprocessing(**{**asdict(self), **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain ints, strings and lists: what a checkpoint stores."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) to float32, zero mean and unit deviation, on the device they are on."""
        mean, std = _on_device(self.mean, images.device), _on_device(self.std, images.device)
        return (images.float() / 255 - mean) / std


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel (3, 1, 1); kept, because a copy to a GPU makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)
