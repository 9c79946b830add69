"""Quantized layers. Shapes: B batch, O outputs, I inputs, C channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.quantizers import Quantizer, recompute_operands
from qat.sites.insert import Cuts, SiteBuilder, swaps
from qat.sites.products import Matrices, Product, same


@swaps(nn.Linear)
class QuantLinear(nn.Module):
    """A linear layer with sites on input (..., I), weight (O, I) and output (..., O).

    There is always a bias, because calibration may move a constant part of the input there; a float layer without one
    gets a buffer of zeros, which is not trained.

    Args:
        linear: the float layer; its weight and bias are shared.
        site: builder for the three sites.
        weight_cuts, input_cuts: axis and groups of further granularities that only the parent knows (heads).
    """

    input_name = "input_quant"

    def __init__(
        self, linear: nn.Linear, site: SiteBuilder, weight_cuts: Cuts | None = None, input_cuts: Cuts | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.born_bias = linear.bias is None
        if self.born_bias:
            self.register_buffer("bias", linear.weight.detach().new_zeros(self.out_features))
        else:
            self.bias = linear.bias
        self.add_input_site(site, {"channel": (-1, self.in_features), **(input_cuts or {})})
        self.weight_quant = site.weight("weight_quant", channel=(0, self.out_features), **(weight_cuts or {}))
        self.output_quant = site.activation("output_quant", channel=(-1, self.out_features))

    def add_input_site(self, site: SiteBuilder, cuts: Cuts) -> None:
        """Register the site called `input_name`."""
        self.input_quant = site.activation("input_quant", **cuts)

    @property
    def input_site(self) -> nn.Module:
        """The site called `input_name`."""
        return self.input_quant

    def forward(self, x: Tensor, more_bias: Tensor | None = None) -> Tensor:
        """(..., I) to (..., O); ``more_bias`` (O,) is added to the bias."""
        linear = partial(F.linear, bias=self.bias if more_bias is None else self.bias + more_bias)
        x = recompute_operands(linear, (self.input_site, x), (self.weight_quant, self.weight))
        out: Tensor = self.output_quant(x)
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Fill in zeros for a bias that is missing, unless a zero point may have been folded into it."""
        if self.born_bias and f"{prefix}{self.input_name}.zero_point" not in state_dict:
            state_dict.setdefault(f"{prefix}bias", torch.zeros_like(self.bias))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def products(self) -> list[Product]:
        """Rows of the input (..., I) with the weight (O, I)."""
        matrices = Matrices(same, same, (None, 0), lambda x: x.flatten(0, -2), lambda x: 1, self.weight)
        return [Product(self.input_name, "weight_quant", lambda shape: prod(shape) * self.out_features, matrices)]

    def extra_repr(self) -> str:
        """Inputs and outputs, for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}"


class QuantGatedLinear(QuantLinear):
    """A linear layer that reads the product of a gate and a value.

    That product has both signs, so its site is ``gated.input_quant``: a rule for the output of GELU does not match it.
    """

    input_name = "gated.input_quant"

    def add_input_site(self, site: SiteBuilder, cuts: Cuts) -> None:
        """Register the site one level deeper than that of other layers."""
        self.gated = nn.ModuleDict({"input_quant": site.child("gated").activation("input_quant", **cuts)})

    @property
    def input_site(self) -> nn.Module:
        """The site called `input_name`."""
        return self.gated["input_quant"]


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
        x = recompute_operands(self._conv, (self.input_quant, x), (self.weight_quant, self.weight))
        out: Tensor = self.output_quant(x)
        return out

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, **self.options)

    def products(self) -> list[Product]:
        """Patches of (B, I, H, W) with (O, I, kh, kw); as matrices only where nothing pads, dilates or groups.

        Padding adds zeros to a patch that do not pass the quantizer.
        """
        cuts = self.options["padding"] in ((0, 0), "valid") and self.options["groups"] == 1
        matrices = self._matrices() if cuts and self.options["dilation"] == (1, 1) else None
        return [Product("input_quant", "weight_quant", self._macs, matrices)]

    def _matrices(self) -> Matrices:
        cut = partial(patches, size=self.weight.shape[2:], stride=self.options["stride"])
        return Matrices(cut, lambda weight: weight.flatten(-3), (None, 0), same, lambda x: len(cut(x[:1])), self.weight)

    def _macs(self, shape: tuple[int, ...]) -> int:
        out = F.conv2d(self.weight.new_zeros(*shape, device="meta"), self.weight.to("meta"), **self.options)
        return out.numel() * self.weight[0].numel()

    def extra_repr(self) -> str:
        """Weight shape and options, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}, {self.options}"


def patches(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(..., B, C, H, W) to the patches of a convolution, (..., T, C * kh * kw), for the T tokens of all images."""
    cut = x.unfold(-2, size[0], stride[0]).unfold(-2, size[1], stride[1])  # (..., B, C, H', W', kh, kw)
    return cut.movedim(-5, -3).flatten(-3).flatten(-4, -2)


@swaps(nn.LayerNorm)
@swaps(timm.layers.LayerNorm)
class QuantLayerNorm(nn.Module):
    """A LayerNorm over the last axis with a site on its output (..., C).

    An `IntegerNorm` at that site computes the norm from the integers of its input, which are multiples of the step of
    ``source``, set by `qat.sites.insert.connect_norms`. The source may have fewer channels: patch merging of Swin
    concatenates tokens, which share its one step.
    """

    def __init__(self, norm: nn.LayerNorm, site: SiteBuilder) -> None:
        super().__init__()
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.output_quant = site.activation("output_quant", channel=(-1, norm.normalized_shape[-1]))
        self.source: tuple[Quantizer, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        y: Tensor = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        if self.source:
            if x.dtype in (torch.float16, torch.bfloat16) and self.output_quant.enabled:
                raise QatError(
                    f"IntegerNorm reads integers from a tensor of {x.dtype}, which cannot hold them: run with "
                    "trainer.precision 32-true"
                )
            integers = (x.detach().float() / self.source[0].step.detach()).round_()
            y = self.output_quant(y, integers, self.weight, self.bias)
        else:
            y = self.output_quant(y)
        return y

    def extra_repr(self) -> str:
        """Size, for ``print(model)``."""
        return f"{self.normalized_shape}, eps={self.eps}"


@swaps(timm.layers.RmsNorm)
class QuantRmsNorm(nn.Module):
    """Division by the root mean square over the last axis, with a site on its output (..., C)."""

    normalize: Any = timm.layers.RmsNorm.forward

    def __init__(self, norm: timm.layers.RmsNorm, site: SiteBuilder) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self._fast_norm = norm.normalized_shape, norm.eps, norm._fast_norm
        self.weight = norm.weight
        self.output_quant = site.activation("output_quant", channel=(-1, norm.normalized_shape[-1]))
        if isinstance(self.output_quant, Quantizer) and self.output_quant.reads_integers:
            raise QatError(
                f"site '{site.prefix}output_quant': IntegerNorm is a LayerNorm, this is an RmsNorm: use Uniform"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        out: Tensor = self.output_quant(self.normalize(x))
        return out
