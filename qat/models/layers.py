"""Quantised linear and convolution layers. Shapes: B batch, O outputs, I inputs."""

from __future__ import annotations

from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qat.describe import Product
from qat.errors import QatError
from qat.insert import Cuts, SiteBuilder, swaps
from qat.quantizers import product


@swaps(nn.Linear)
class QuantLinear(nn.Module):
    """A linear layer with sites on input (..., I), weight (O, I) and output (..., O).

    Args:
        linear: the float layer; its weight and bias are shared.
        site: builder for the three sites.
        weight_cuts, input_cuts: further granularities, axis and groups, that only the parent knows (heads).
    """

    def __init__(
        self, linear: nn.Linear, site: SiteBuilder, weight_cuts: Cuts | None = None, input_cuts: Cuts | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quant = site.activation("input_quant", channel=(-1, self.in_features), **(input_cuts or {}))
        self.weight_quant = site.weight("weight_quant", channel=(0, self.out_features), **(weight_cuts or {}))
        self.output_quant = site.activation("output_quant", channel=(-1, self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        x = product(self._linear, (self.input_quant, x), (self.weight_quant, self.weight))
        out: Tensor = self.output_quant(x)
        return out

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def products(self, shape: tuple[int, ...]) -> list[Product]:
        """The products of one application, from the shape of its input."""
        return [Product(prod(shape) * self.out_features, "input_quant", "weight_quant")]

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


@swaps(nn.Conv2d)
class QuantConv2d(nn.Module):
    """A convolution with sites on input (B, I, H, W), weight (O, I, kh, kw) and output (B, O, H', W')."""

    def __init__(self, conv: nn.Conv2d, site: SiteBuilder) -> None:
        super().__init__()
        if conv.padding_mode != "zeros":
            raise QatError(f"{site.prefix}padding_mode {conv.padding_mode!r} is not reproduced: only zeros is")
        self.options: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
        }
        self.weight, self.bias = conv.weight, conv.bias
        self.input_quant = site.activation("input_quant", channel=(1, conv.in_channels))
        self.weight_quant = site.weight("weight_quant", channel=(0, conv.out_channels))
        self.output_quant = site.activation("output_quant", channel=(1, conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        x = product(self._conv, (self.input_quant, x), (self.weight_quant, self.weight))
        out: Tensor = self.output_quant(x)
        return out

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, **self.options)

    def products(self, shape: tuple[int, ...]) -> list[Product]:
        """The products of one application, from the shape of its input."""
        out = F.conv2d(self.weight.new_zeros(*shape, device="meta"), self.weight.to("meta"), **self.options)
        return [Product(out.numel() * self.weight[0].numel(), "input_quant", "weight_quant")]

    def extra_repr(self) -> str:
        """Weight shape and options, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}, {self.options}"
