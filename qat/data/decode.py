"""An image file to pixels. Shapes: H, W pixels of the image as stored.

The orientation in EXIF is ignored, as in every published ImageNet result, and every image becomes RGB. JPEG goes
through torchvision, whose pixels are Pillow's and which needs two thirds of the time; whatever else there is, and what
torchvision does not read, goes through Pillow, whose errors say more.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

JPEG = b"\xff\xd8"


def decode(path: Path) -> Tensor:
    """RGB pixels of a file, uint8 (3, H, W), the channels of a pixel side by side in memory.

    Raises whatever Pillow raises for a file that cannot be read; `reason` puts it into words.
    """
    content = path.read_bytes()
    if content.startswith(JPEG):
        try:
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        except RuntimeError:  # damaged, or a kind that Pillow may know
            pixels = torch.empty(0)
        if len(pixels) in (1, 3):  # not CMYK, of which there are several kinds
            rgb: Tensor = pixels.expand(3, -1, -1)
            return rgb
    with Image.open(io.BytesIO(content)) as image:
        return to_tensor(image.convert("RGB"))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W), the channels of a pixel side by side in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """What `to_tensor` was made of."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def reason(error: Exception) -> str:
    """Why an image could not be read, in one line and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
