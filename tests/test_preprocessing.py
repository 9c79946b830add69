"""The evaluation transform: another size keeps timm's ratio of crop to resize."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from qat.data.decode import to_tensor
from qat.data.images import EvalView
from qat.errors import QatError
from qat.models import default_preprocessing
from qat.preprocessing import Preprocessing

SHAPES = [(500, 375), (375, 500), (600, 449), (1024, 431)]  # width, height


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [224, 240, 384])
def test_evaluation_is_that_of_timm_to_the_bit_at_every_size(size, pct, interpolation):
    mean, std = (0.5,) * 3, (0.5,) * 3
    ours = Preprocessing(224, int(224 / pct), interpolation, mean, std, pct).override({"size": size})
    theirs = create_transform(size, interpolation=interpolation, crop_pct=pct, normalize=False)
    for shape in SHAPES:
        image, out = noise(*shape), torch.empty(1, 3, size, size, dtype=torch.uint8)
        EvalView(ours)(to_tensor(image), 0, out)
        assert torch.equal(out[0], theirs(image))


@pytest.mark.parametrize(("size", "resize"), [(224, 248), (240, 266), (384, 426)])
def test_the_resize_of_a_model_follows_its_size(size, resize):
    arch = "deit_tiny_patch16_224"  # crop_pct 0.9
    assert default_preprocessing(arch, {"img_size": size}).resize == resize
    assert default_preprocessing(arch).override({"size": size}).resize == resize
    assert default_preprocessing(arch).override({"size": size, "resize": 500}).resize == 500


def test_the_ratio_is_no_field_of_a_checkpoint_and_no_option():
    found = default_preprocessing("deit_tiny_patch16_224")
    assert set(found.to_dict()) == {"size", "resize", "interpolation", "mean", "std"}
    assert Preprocessing(**found.to_dict()) == found
    with pytest.raises(QatError, match="has no 'crop_pct'"):
        found.override({"crop_pct": 1.0})
