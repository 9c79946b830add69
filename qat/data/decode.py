"""An image file to pixels. Shapes: H, W pixels of the image as stored.

The orientation in EXIF is ignored, as in every published ImageNet result, and every image becomes RGB. Pillow decodes:
torchvision's JPEG reader gives the same bits in 72 % of the time, but is deprecated and about to go. JPEG's own scaled
decoding is left alone: it changes pixels, and only a crop twice as large as the student's input could use it.
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
    """What `to_tensor` was made of."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def new_images(count: int, size: int) -> Tensor:
    """Memory for uint8 (count, 3, size, size); in a worker it is shared, so that a batch is not copied on its way."""
    shape = (count, 3, size, size)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(torch.Size(shape).numel())
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def reason(error: Exception) -> str:
    """Why an image could not be read, in one line and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
