"""Any image that Pillow opens becomes 8-bit RGB, or is refused by name.

- Alpha and transparent colours are laid on white, as a browser shows them. timm and torchvision drop alpha, and so show
  colours that nobody was meant to see.
- 12 and 16 bits per channel are scaled by their range, so that the largest value becomes 255. Pillow alone cuts grey
  values off at 255.
- Grey, palette, 1 bit, CMYK, YCbCr and HSV are converted by Pillow, as in timm and torchvision.
- CIELAB is converted by Pillow's colour management.
- Floating-point numbers and 32-bit integers are refused: they do not say which value is white.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

WHITE = (255, 255, 255, 255)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose grey values lie in 0..65535 also where Pillow calls them "I"
ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB; ValueError for pixels that cannot be shown."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in SIXTEEN_BITS):
        return _from_grey(image)
    if mode in ALPHA or "transparency" in image.info:
        shown = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, WHITE), shown).convert("RGB")
    if mode == "RGB":
        return image
    if mode in ("I", "F"):
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, which do not say what is white: convert it to 8 or 16 bits")
    return _from_lab(image) if mode == "LAB" else image.convert("RGB")


def _from_grey(image: Image.Image) -> Image.Image:
    """A grey image of 12 or 16 bits, scaled by its range."""
    tags = getattr(image, "tag_v2", {})
    highest = 2 ** int(tags.get(BITS_PER_SAMPLE, (16,))[0]) - 1
    values = np.asarray(image).astype(np.float32)
    hidden = values == image.info.get("transparency")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = highest - values
    grey = np.clip(np.rint(values * (255 / highest)), 0, 255).astype(np.uint8)
    grey[hidden] = 255
    return Image.fromarray(grey).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    try:
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    except ImportError:
        raise ValueError("its colours are CIELAB, and this Pillow has no colour management") from None
    shown = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert shown is not None
    return shown
