"""What happens to an image before a model sees it. Shapes: B images, S pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from math import floor
from typing import Annotated, Any, Literal, get_type_hints

import torch
from torch import Tensor

from qat.errors import QatError
from qat.ranges import Range, check_fields, check_value

Interpolation = Literal["nearest", "bilinear", "bicubic"]
FIELDS = ("size", "resize", "interpolation", "mean", "std")  # what can be set, and what a checkpoint stores
Mean = Annotated[float, Range(-100, 100)]
Deviation = Annotated[float, Range(above=0, high=100)]


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation transform and normalization of one model.

    Args:
        size: side of the square input, pixels.
        resize: length the short side is resized to before the centre crop, pixels.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        mean, std: per RGB channel, for values in 0..1.
        crop_pct: size over resize, as timm states it for the model, which gives the resize of another size; no
            checkpoint stores it.
    """

    size: Annotated[int, Range(1, 4096)]
    resize: Annotated[int, Range(1, 16384)]
    interpolation: Interpolation
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]
    crop_pct: Annotated[float, Range(above=0)] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self, "preprocessing.")
        if self.size > self.resize:
            raise QatError(f"preprocessing.size is {self.size}: give at most preprocessing.resize, {self.resize}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))

    def override(self, values: Mapping[str, Any]) -> Preprocessing:
        """The same with some values replaced; ``None`` keeps a value, an unknown name is an error."""
        check_partial(values)
        given = {name: value for name, value in values.items() if value is not None}
        if "size" in given and "resize" not in given:  # keep the model's ratio of crop to resize, as timm does
            size, pct = given["size"], self.crop_pct
            given["resize"] = floor(size / pct) if pct else round(size * self.resize / self.size)
        return Preprocessing(**{**asdict(self), **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain ints, strings and lists: what a checkpoint stores."""
        values = ((name, getattr(self, name)) for name in FIELDS)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) to float32, zero mean and unit deviation, on the device they are on."""
        mean, std = _on_device(self.mean, images.device), _on_device(self.std, images.device)
        return (images.float() / 255 - mean) / std


def check_partial(values: Mapping[str, Any], prefix: str = "preprocessing.") -> None:
    """Check some fields of a `Preprocessing`, each for itself; None stands for a field that is not given.

    Raises:
        QatError: an unknown name, or a value of a wrong type or out of its range.
    """
    hints = get_type_hints(Preprocessing, include_extras=True)
    known = {name: hints[name] for name in FIELDS}
    for name, value in values.items():
        if name not in known:
            raise QatError(f"{prefix.removesuffix('.')} has no {name!r}: choose from {', '.join(sorted(known))}")
        if value is not None:
            check_value(f"{prefix}{name}", value, known[name])


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel (3, 1, 1); kept, because a copy to a GPU makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)
