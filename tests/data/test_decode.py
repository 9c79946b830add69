"""An image file becomes RGB pixels as they are stored, or one line that says what is wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from qat.data.decode import decode, read_image, reason, size_of, to_image, to_tensor

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


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_orientation_in_exif_counts_only_where_it_is_asked_for(turn: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    PHOTO.save(tmp_path / "turned.jpg", exif=exif)
    PHOTO.save(tmp_path / "plain.jpg")
    plain = decode(tmp_path / "plain.jpg")
    assert torch.equal(decode(tmp_path / "turned.jpg"), plain)
    with Image.open(tmp_path / "turned.jpg") as image:
        expected = to_tensor(ImageOps.exif_transpose(image))
    assert torch.equal(decode(tmp_path / "turned.jpg", upright=True), expected)
    assert torch.equal(decode(tmp_path / "plain.jpg", upright=True), plain)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_reason_to_refuse_an_image(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    PHOTO.save(tmp_path / "plain.jpg")
    assert torch.equal(decode(tmp_path / "odd.jpg", upright=True), decode(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_image_is_used_and_this_is_noted(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "moving", kind, save_all=True, append_images=frames[1:], **options)
    pixels, note = read_image(tmp_path / "moving")
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert note == "has 3 images, of which the first is used"
    frames[0].save(tmp_path / "still", kind)
    assert read_image(tmp_path / "still").note == ""


def test_content_is_decoded_as_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content("jpeg"))
    assert torch.equal(decode(io.BytesIO(content("jpeg"))), decode(tmp_path / "a.jpg"))
    assert size_of(tmp_path / "a.jpg") == (203, 151)


def test_no_other_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PHOTO.save(tmp_path / "script.jpg", "EPS")
    monkeypatch.setattr("subprocess.Popen", None)  # Ghostscript would run
    with pytest.raises(UnidentifiedImageError, match="not an image"):
        decode(tmp_path / "script.jpg")


def test_a_decompression_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(content("png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the limit of Pillow is 89 million
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit"):
        decode(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIF file, which Pillow cannot read: convert it to JPEG"),
        (
            b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x08\0\x08\x01\x01\x11\0",
            "a JPEG file of a kind .* cannot handle 12-bit layers",
        ),
    ],
)
def test_a_kind_that_pillow_cannot_read_is_named(start: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(start)
    with pytest.raises(UnidentifiedImageError, match=words):
        decode(tmp_path / "a.jpg")


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
