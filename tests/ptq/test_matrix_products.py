"""Which products of a model are searched, and how their operands become matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat.models  # noqa: F401  registers the families
from qat.models.layers import QuantConv2d, patches
from qat.ptq.matrix_products import matrix_products
from qat.sites.insert import SiteBuilder


@pytest.mark.parametrize(("size", "stride"), [((4, 4), (4, 4)), ((3, 2), (2, 1))])
def test_a_convolution_is_a_product_of_patches(size, stride):
    x, weight = torch.randn(2, 3, 8, 12, dtype=torch.float64), torch.randn(5, 3, *size, dtype=torch.float64)
    out = patches(x, size, stride) @ weight.flatten(1).mT
    torch.testing.assert_close(out, F.conv2d(x, weight, stride=stride).permute(0, 2, 3, 1).flatten(0, 2))
    assert torch.equal(patches(x[None], size, stride)[0], patches(x, size, stride)), "candidates come first"


@pytest.mark.parametrize(
    ("options", "counted"),
    [({}, 1), ({"padding": "valid"}, 1), ({"padding": 1}, 0), ({"padding": "same"}, 0), ({"dilation": 2}, 0),
     ({"groups": 2}, 0)],
)  # fmt: skip
def test_a_convolution_that_does_more_is_left_out(options, counted):
    model = nn.Sequential(QuantConv2d(nn.Conv2d(4, 4, 2, **options), SiteBuilder([])))
    assert len(matrix_products(model)) == counted
