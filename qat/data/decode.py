"""Decodes image files. Shapes: H, W pixels of the image.

Every image becomes RGB. Pillow decodes: torchvision's JPEG reader gives the same bits in 72 % of the time, but is
deprecated. The scaled decoding of JPEG is not used: it changes pixels, and only a crop twice as large as the student's
input could profit from it. `qat.data.rgb` says what becomes of pixels that are not 8-bit RGB.

The orientation in EXIF is ignored unless it is asked for, as in every published ImageNet result.
"""

from __future__ import annotations

import struct
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from qat.data.rgb import to_rgb

# JPEG first, because Pillow tries them in this order. Others, above all EPS, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000", "AVIF")
ORIENTATION = 0x0112  # tag of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")  # brands of ISO media files
TELLING = ("cannot handle", "unknown", "unsupported")  # how Pillow begins when a file is sound, but unusual
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # some images of ImageNet; their pixels are fine


class Decoded(NamedTuple):
    """An image, and what a user should know about it."""

    pixels: Tensor  # uint8 (3, H, W), the channels of a pixel side by side in memory
    note: str  # of a file with several images; empty for others


def decode(file: Path | BinaryIO, upright: bool = False) -> Tensor:
    """RGB pixels of an image, as `read_image` gives them."""
    return read_image(file, upright).pixels


def read_image(file: Path | BinaryIO, upright: bool = False) -> Decoded:
    """Decode the first image of a file.

    Args:
        file: a file, or its content.
        upright: turn it as the orientation in its EXIF says.

    Raises whatever Pillow raises for a file that cannot be read; `reason` puts it into words.
    """
    try:
        with Image.open(file, formats=_formats()) as image:
            if image.format == "JPEG" and image.mode == "RGB" and not upright:
                return Decoded(to_tensor(image), "")
            frames = getattr(image, "n_frames", 1)
            note = f"has {frames} images, of which the first is used" if frames > 1 and image.format != "MPO" else ""
            whole = to_rgb(image)
            turn = UPRIGHT.get(_orientation(image)) if upright else None
            return Decoded(to_tensor(whole if turn is None else whole.transpose(turn)), note)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(_unidentified(file)) from None


def size_of(file: Path | BinaryIO) -> tuple[int, int]:
    """W and H of an image, from its first bytes; raises what `decode` raises."""
    try:
        with Image.open(file, formats=_formats()) as image:
            return image.size
    except UnidentifiedImageError:
        raise UnidentifiedImageError(_unidentified(file)) from None


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
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF of a loaded image; 1, upright, where it has none or one that is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's reader of EXIF raises what it likes; the pixels are there all the same
        return 1


def _unidentified(file: Path | BinaryIO) -> str:
    """Why Pillow does not know a file: what the reader of its format says, or that it is no image."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return _unidentified(opened)
    file.seek(0)
    start = file.read(16)
    if start[4:8] == b"ftyp" and start[8:12] in HEIF:
        kind = "an AVIF file, which this version of" if start[8:11] == b"avi" else "a HEIF file, which"
        return f"{kind} Pillow cannot read: convert it to JPEG"
    for name in _formats():
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(start) is True:
            file.seek(0)
            try:
                factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error, OSError) as error:
                if str(error).lower().startswith(TELLING):
                    return f"a {name} file of a kind that Pillow cannot read: {error}"
    return "not an image"
