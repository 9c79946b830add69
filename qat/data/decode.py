"""Decodes image files. Shapes: H, W pixels of the image as it is stored.

The orientation in EXIF is ignored, as in every published ImageNet result, and every image becomes RGB. Pillow decodes:
torchvision's JPEG reader gives the same bits in 72 % of the time, but is deprecated. The scaled decoding of JPEG is not
used: it changes pixels, and only a crop twice as large as the student's input could profit from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info


def decode(path: Path) -> Tensor:
    """RGB pixels of a file, uint8 (3, H, W), the channels of a pixel side by side in memory.

    Raises whatever Pillow raises for a file that cannot be read; `reason` puts it into words.
    """
    with Image.open(path) as image:
        return to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W), the channels of a pixel side by side in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """The RGB image that `to_tensor` turns into ``pixels`` uint8 (3, H, W)."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def new_images(count: int, size: int) -> Tensor:
    """New memory uint8 (count, 3, size, size); a worker shares it with the main process, so that no batch is copied."""
    shape = (count, 3, size, size)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(torch.Size(shape).numel())
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def reason(error: Exception) -> str:
    """Say in one line, without the path, why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
