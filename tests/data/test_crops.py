"""Crop boxes: their distribution, the central fallback, and what replay does to pixels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from qat.data.crops import Crop, CropDistribution, draw, replay
from qat.data.decode import to_image, to_tensor
from qat.data.streams import rng_for
from qat.errors import QatError


def noise(height: int, width: int) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", (0.0, 1.0)), ("scale", (0.5, 0.2)), ("scale", (0.5, 1.5)), ("ratio", (2.0, 1.0)), ("flip", 1.5)],
)
def test_a_bad_distribution_is_refused_by_key_and_value(key, value):
    with pytest.raises(QatError, match=f"crop {key} is .*{str(value)[-4:-1]}"):
        CropDistribution(**{key: value})


def test_boxes_have_torchvision_distribution():
    height, width, count = 90, 140, 3000
    rng = np.random.default_rng(1)
    drawn = [draw(CropDistribution(), height, width, rng) for _ in range(count)]
    ours = np.array([[c.top, c.left, c.height, c.width] for c in drawn])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    for q in (10, 50, 90):  # five standard errors of a quantile are about 4 pixels here
        assert np.abs(np.percentile(ours, q, axis=0) - np.percentile(theirs, q, axis=0)).max() <= 5


def test_boxes_lie_inside_and_flips_have_their_rate():
    crops = [draw(CropDistribution(flip=0.25), 37, 21, rng_for(0, 0, i)) for i in range(2000)]
    assert all(c.top >= 0 and c.left >= 0 and c.top + c.height <= 37 and c.left + c.width <= 21 for c in crops)
    assert abs(np.mean([c.flip for c in crops]) - 0.25) < 0.05


@pytest.mark.parametrize(
    ("size", "box"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((1, 1), (0, 0, 1, 1)), ((60, 50), (0, 0, 60, 50))],
)
def test_the_fallback_is_the_largest_centred_box(size, box):
    crops = CropDistribution(scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3), flip=0.0)
    if size == (60, 50):  # the whole image has an allowed aspect, but no other box of its area fits
        crops = CropDistribution(scale=(1.0, 1.0), ratio=(0.75, 0.7500001), flip=0.0)
        box = (0, 2, 60, 45)
    assert draw(crops, *size, rng_for(0, 0, 0)) == Crop(*box, flip=False)


def test_a_draw_is_a_function_of_seed_epoch_and_index():
    first = draw(CropDistribution(), 200, 300, rng_for(1, 2, 3))
    assert first == draw(CropDistribution(), 200, 300, rng_for(1, 2, 3))
    others = [draw(CropDistribution(), 200, 300, rng_for(*key)) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert first not in others


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_replay_is_that_of_pillow_to_two_levels(interpolation):
    smooth = to_image(noise(12, 16)).resize((250, 190), Image.Resampling.BICUBIC)  # as smooth as a photograph
    how = Image.Resampling[interpolation.upper()]
    crops = [draw(CropDistribution(), 190, 250, rng_for(0, 0, i)) for i in range(50)]
    views = replay(to_tensor(smooth), crops, 64, interpolation)
    for crop, view in zip(crops, views, strict=True):
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        pillow = to_tensor(smooth.crop(box).resize((64, 64), how))
        difference = (view.int() - (pillow.flip(-1) if crop.flip else pillow).int()).abs()
        assert difference.max() <= 2  # torch rounds weights to 16 bits, Pillow to 22
        assert (difference > 0).float().mean() < 0.1


def test_replay_crops_resizes_and_flips_as_torchvision_does():
    image = noise(40, 50)
    expected = resized_crop(image, 3, 7, 20, 30, [16, 16], antialias=True)
    views = replay(image, [Crop(3, 7, 20, 30, False), Crop(3, 7, 20, 30, True)], 16, "bilinear")
    difference = views.int() - torch.stack([expected, expected.flip(-1)]).int()
    assert difference.abs().max() <= 1  # which of torch's two loops runs depends on the layout in memory
    assert views.dtype == torch.uint8
    assert views.is_contiguous()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_replay_by_hand(interpolation):
    image = torch.arange(4 * 4 * 3, dtype=torch.uint8).reshape(4, 4, 3).permute(2, 0, 1)
    (view,) = replay(image, [Crop(1, 2, 2, 2, flip=True)], 2, interpolation)  # no resize: pixels (1..2, 2..3), mirrored
    assert view[0].tolist() == [[21, 18], [33, 30]]
    assert math.prod(view.shape) == 12
