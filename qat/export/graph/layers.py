"""Layers and attention whose products read integers.

Shapes: B batch, N tokens, I inputs, O outputs, H heads, D head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.export.graph.grid import grid_of
from qat.export.graph.ladder import LadderSite
from qat.export.graph.sites import ActivationSite, Parts, WeightCodes, parts_of
from qat.models.attention import AttentionSites
from qat.models.layers import QuantConv2d, QuantLinear
from qat.quantizers import Quantizer
from qat.sites.insert import quantizers, weights


def weight_of(site: nn.Module, weight: Tensor, flip: bool = False) -> nn.Module:
    """The values of a weight, from codes where they are on a grid.

    Args:
        site: of the weight.
        weight: (O, I), or another shape.
        flip: as (I, O).
    """
    grid = grid_of(site) if isinstance(site, Quantizer) else None
    if grid is not None:
        return WeightCodes(weight, grid, flip)
    values = site(weight).detach()
    return Constant(values.mT.contiguous() if flip else values)


def activation_of(name: str, quantizer: Quantizer) -> nn.Module:
    """The site of an activation; QatError where it has no ONNX form."""
    grid = grid_of(quantizer)
    return LadderSite(name, quantizer) if grid is None else ActivationSite(name, grid)


class Constant(nn.Module):
    """A tensor."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *unused: Any) -> Tensor:
        """The tensor."""
        return self.value


def over_axis(factor: Tensor | None, axis: int) -> bool:
    """Whether a factor differs along an axis, counted from the end, over which a product sums."""
    return factor is not None and factor.ndim >= -axis and factor.shape[axis] > 1


def past_product(parts: Parts, axis: int) -> Parts:
    """The same tensor with a factor and an offset that a product over ``axis`` can be followed by."""
    if over_axis(parts.factor, axis) or over_axis(parts.offset, axis):
        return Parts(parts.whole())
    return parts


class GraphLinear(nn.Module):
    """A `QuantLinear` with the weight as (I, O): behind a transposition, runtimes see no integers."""

    bias: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.input_site, self.output_quant = layer.input_site, layer.output_quant
        self.weight = weight_of(layer.weight_quant, layer.weight, flip=True)
        self.register_buffer("bias", layer.bias.detach())
        with torch.no_grad():
            self.register_buffer("sums", layer.weight_quant(layer.weight).sum(1))  # (O,), for an offset of the input

    def forward(self, x: Tensor, more_bias: Tensor | None = None) -> Tensor:
        """(..., I) to (..., O)."""
        bias = self.bias if more_bias is None else self.bias + more_bias
        read = past_product(parts_of(self.input_site, x), -1)
        out = read.values @ self.weight()
        if read.factor is not None:
            out = out * read.factor
        if read.offset is not None:
            bias = bias + read.offset * cast(Tensor, self.sums)
        found: Tensor = self.output_quant(out + bias)
        return found


class GraphConv2d(nn.Module):
    """A `QuantConv2d`. An offset is added before a convolution that pads: the zeros around the input have none."""

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__()
        self.input_quant, self.output_quant, self.options = layer.input_quant, layer.output_quant, layer.options
        self.weight = weight_of(layer.weight_quant, layer.weight)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        x = parts_of(self.input_quant, x).whole()
        found: Tensor = self.output_quant(F.conv2d(x, self.weight(), cast(Any, self.bias), **self.options))
        return found


class GraphAttention:
    """Comes before a class of attention: both products read integers, and scales by head follow them."""

    def attend(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `AttentionSites.attend`."""
        left, right = past_product(parts_of(self.q_quant, q), -1), past_product(parts_of(self.k_quant, k), -1)
        left = left if left.offset is None else Parts(left.whole())
        right = self._repeated(right if right.offset is None else Parts(right.whole()))
        factor: Any = self.scale
        for own in (left.factor, right.factor):
            factor = factor if own is None else own * factor
        scores = (left.values @ right.values.transpose(-2, -1)) * factor  # (B, H, N, N)
        scores = self.scores_quant(scores)
        for more in (bias, _additive(mask, is_causal, scores)):
            scores = scores if more is None else scores + more
        probs, values = past_product(parts_of(self.probs_quant, scores.softmax(-1)), -1), parts_of(self.v_quant, v)
        values = past_product(values if values.offset is None else Parts(values.whole()), -2)
        values = self._repeated(values)
        out = probs.values @ values.values
        for own in (probs.factor, values.factor):
            out = out if own is None else out * own
        if probs.offset is not None:
            sums = values.values.sum(-2, keepdim=True)  # (B, H, 1, D)
            out = out + probs.offset * (sums if values.factor is None else sums * values.factor)
        return cast(Tensor, out)

    def _repeated(self: Any, parts: Parts) -> Parts:
        """Keys or values of fewer heads, for every head of queries."""
        if self.repeats == 1:
            return parts
        return Parts(self._repeat(parts.whole()))


def _additive(mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """The mask as a summand of the scores, or None."""
    if is_causal:
        return scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        return torch.where(mask, 0.0, float("-inf"))
    return mask


def as_graph(model: nn.Module) -> nn.Module:
    """Replace, in place, every layer, attention and site of a quantized model in evaluation mode.

    Raises:
        QatError: a site has no ONNX form.
    """
    for module in list(model.modules()):
        if isinstance(module, AttentionSites):
            _use_graph_attention(module)
    for name, quantizer in list(quantizers(model)):
        if quantizer.layout.batched:
            _replace(model, name, activation_of(name, quantizer))
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            _replace(model, name, GraphLinear(module))
        elif isinstance(module, QuantConv2d):
            _replace(model, name, GraphConv2d(module))
    for site in list(weights(model)):  # of no layer: positions
        _replace(model, site.name, weight_of(site.quantizer, site.weight))
    return model


def _use_graph_attention(module: AttentionSites) -> None:
    """Give an attention the products above: its class is made of both."""
    kind, own = type(module), {}
    if hasattr(module, "position_bias"):
        with torch.no_grad():
            bias = cast(Any, module).position_bias().detach()
        module.register_buffer("constant_bias", bias, persistent=False)
        own["position_bias"] = lambda self: self.constant_bias
    module.__class__ = type(f"Graph{kind.__name__}", (GraphAttention, kind), own)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.eval())
