"""Pixels of every kind become 8-bit RGB, or are refused by name; small images made by hand, and real odd ones."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.decode import decode, read_image, reason

ODD = Path(__file__).parents[3] / "shared" / "data" / "odd_images"
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def made(mode: str, *channels: np.ndarray) -> Image.Image:
    """An image (16, 16) of these channels."""
    return Image.frombytes(mode, (16, 16), np.stack(channels, -1).tobytes())


def tiff(values: np.ndarray, bits: int, white_is_zero: bool = False) -> io.BytesIO:
    """A grey TIFF without compression; 12-bit values are packed, three bytes for two of them."""
    height, width = values.shape
    content = values.astype("<u2").tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        content = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in pairs.tolist())
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: height,
            279: len(content)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(content))
    return io.BytesIO(header + content + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0")


@pytest.mark.parametrize(
    "file",
    [
        lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
        lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
        lambda: tiff(GREY.astype(np.uint16) * 257, 16),
        lambda: tiff(65535 - GREY.astype(np.uint16) * 257, 16, white_is_zero=True),
        lambda: tiff(np.rint(GREY * (4095 / 255)).astype(np.uint16), 12),
        lambda: saved(Image.fromarray(GREY), "PNG"),
        lambda: io.BytesIO(b"P5\n16 16\n65535\n" + (GREY.astype(">u2") * 257).tobytes()),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "16-bit TIFF by hand", "white is zero", "12-bit TIFF", "8-bit PNG", "16-bit PGM"],
)
def test_grey_values_are_scaled_by_their_range(file):
    pixels = decode(file())
    assert torch.equal(pixels, torch.from_numpy(GREY).expand(3, 16, 16))


def png16(*channels: np.ndarray) -> io.BytesIO:
    """A 16-bit PNG with 3 channels (RGB), 4 (RGB and alpha) or 2 (grey and alpha), which Pillow does not write."""
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    kind = {2: 4, 3: 2, 4: 6}[len(channels)]
    rows = np.stack(channels, -1).astype(">u2")
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", 16, 16, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def test_colours_of_16_bits_are_scaled_too():
    wide = GREY.astype(np.uint16) * 257
    assert torch.equal(decode(png16(wide, wide, wide)), torch.from_numpy(GREY).expand(3, 16, 16))


@pytest.mark.parametrize("alpha", [0, 128, 255])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "16-bit grey and alpha", "16-bit RGBA", "WebP"])
def test_alpha_is_laid_on_white(kind, alpha):
    wide, opacity = GREY.astype(np.uint16) * 257, np.full_like(GREY, alpha)
    files = {
        "RGBA": lambda: saved(made("RGBA", GREY, GREY, GREY, opacity), "PNG"),
        "LA": lambda: saved(made("LA", GREY, opacity), "PNG"),
        "16-bit grey and alpha": lambda: png16(wide, opacity.astype(np.uint16) * 257),
        "16-bit RGBA": lambda: png16(wide, wide, wide, opacity.astype(np.uint16) * 257),
        "WebP": lambda: saved(made("RGBA", GREY, GREY, GREY, opacity), "WEBP", lossless=True, exact=True),
    }
    expected = torch.from_numpy(255 + (GREY.astype(float) - 255) * alpha / 255).expand(3, 16, 16)
    assert (decode(files[kind]()) - expected).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16"])
def test_a_transparent_colour_is_white(mode):
    image = made("RGB", GREY, GREY, GREY) if mode == "RGB" else Image.fromarray(GREY)
    if mode == "P":
        image = image.convert("P")
    if mode == "I;16":
        image = Image.fromarray(GREY.astype(np.uint16) * 257)
    hidden = {"RGB": (3, 3, 3), "I;16": 3 * 257}.get(mode, 3)
    pixels = decode(saved(image, "PNG", transparency=hidden))
    assert pixels[:, 0, 3].tolist() == [255] * 3
    assert pixels[:, 0, 4].tolist() == [4] * 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pillow_does(mode):
    image = made("RGB", GREY, GREY.T, 255 - GREY).convert(mode)
    file = saved(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    with Image.open(file) as opened:
        expected = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(file), expected)


def test_lab_becomes_srgb():
    light = [np.full_like(GREY, value) for value in (255, 0, 0)]  # L* = 100, a* = b* = 0, in the encoding of TIFF
    assert (255 - decode(saved(made("LAB", *light), "TIFF")).int()).abs().max() <= 1


@pytest.mark.parametrize(("dtype", "words"), [(np.float32, "floating-point numbers"), (np.int32, "32-bit integers")])
def test_pixels_that_do_not_say_what_is_white_are_refused(dtype, words):
    with pytest.raises(ValueError, match=words):
        decode(saved(Image.fromarray(GREY.astype(dtype)), "TIFF"))


@pytest.mark.real_data
@pytest.mark.skipif(not ODD.is_dir(), reason=f"needs the odd images in {ODD}")
def test_real_odd_images_are_read_or_refused_by_name():
    def mean(name: str, upright: bool = False) -> float:
        return decode(ODD / name, upright).float().mean().item()

    assert decode(ODD / "hopper_orientation_6.jpg").shape == (3, 128, 128)
    assert decode(ODD / "Landscape_6.jpg").shape == (3, 600, 450)
    assert decode(ODD / "Landscape_6.jpg", upright=True).shape == (3, 450, 600)
    assert mean("12bit.cropped.tif") < 3  # at most 30 of 4095
    assert mean("16bit.cropped.tif") == pytest.approx(1.4, abs=0.1)  # 291 to 694 of 65535
    assert mean("16-bit-grey-alpha.png") > 239  # nearly transparent
    assert mean("transparent.png") == pytest.approx(mean("transparent.webp"), abs=1)
    assert read_image(ODD / "iss634.webp").note == "has 42 images, of which the first is used"
    assert decode(ODD / "pil_sample_cmyk.jpg").shape == (3, 100, 100)
    refused = {
        "samplefilehub.heif": "HEIF",
        "monkey12.jpg": "12-bit layers",
        "cielab-dagams.tiff": "unknown pixel mode",
    }
    for name, words in refused.items():
        with pytest.raises(Exception, match="Pillow cannot read") as caught:
            decode(ODD / name)
        assert words in reason(caught.value)
