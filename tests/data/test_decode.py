"""An image file becomes RGB pixels as they are stored, or one line that says what is wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.decode import decode, reason, to_image, to_tensor

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
PHOTO = NOISE.resize((203, 151), Image.Resampling.BICUBIC)
FILES = {
    "jpeg": (PHOTO, {"format": "JPEG", "quality": 90}),
    "jpeg 4:4:4": (PHOTO, {"format": "JPEG", "subsampling": 0}),
    "progressive": (PHOTO, {"format": "JPEG", "progressive": True}),
    "grey jpeg": (PHOTO.convert("L"), {"format": "JPEG"}),
    "cmyk jpeg": (PHOTO.convert("CMYK"), {"format": "JPEG"}),
    "png": (PHOTO, {"format": "PNG"}),
    "png with alpha": (PHOTO.convert("RGBA"), {"format": "PNG"}),
    "palette": (PHOTO.convert("P"), {"format": "PNG"}),
    "webp": (PHOTO, {"format": "WEBP", "lossless": True}),
}


def content(name: str) -> bytes:
    image, options = FILES[name]
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow_to_the_bit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image.JPEG"  # as in ImageNet, where a PNG is called so
    path.write_bytes(content(name))
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    pixels = decode(path)
    assert pixels.shape == (3, 151, 203)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(np.array(to_image(pixels)), expected)


def test_the_orientation_in_exif_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    PHOTO.save(tmp_path / "turned.jpg", exif=exif)
    PHOTO.save(tmp_path / "plain.jpg")
    assert torch.equal(decode(tmp_path / "turned.jpg"), decode(tmp_path / "plain.jpg"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c[: len(c) // 2], "truncated"),
        (lambda c: c[:20], "not an image"),
        (lambda c: b"", "not an image"),
        (lambda c: b"<html>", "not an image"),
        (lambda c: c[:2] + b"<html>", "not an image"),
    ],
    ids=["half", "start", "empty", "text", "text behind the magic number"],
)
def test_what_is_wrong_with_a_file_is_said(spoil, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(spoil(content("jpeg")))
    with pytest.raises(Exception) as error:  # noqa: PT011 (Pillow raises what it likes)
        decode(path)
    assert words in reason(error.value)
    with pytest.raises(OSError, match="nowhere") as missing:
        decode(tmp_path / "nowhere.jpg")
    assert reason(missing.value) == "No such file or directory"


def test_a_tensor_of_an_image_is_the_image() -> None:
    assert torch.equal(to_tensor(to_image(to_tensor(PHOTO))), to_tensor(PHOTO))
