"""Layers and attention whose products read integers.

Shapes: B batch, N tokens, I inputs, O outputs, H heads, D head width.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.export.graph.grid import grid_of
from qat.export.graph.ladder import LadderSite
from qat.export.graph.rows import KeysOfSites, NormSite, SoftmaxSite
from qat.export.graph.sites import ActivationSite, Folding, Parts, WeightCodes, parts_of
from qat.models.attention import AttentionSites
from qat.models.layers import QuantConv2d, QuantLinear
from qat.quantizers import IntegerNormQuantizer, LogIntSoftmaxQuantizer, Quantizer
from qat.sites.insert import quantizers, weights


def weight_of(site: nn.Module, weight: Tensor, flip: bool = False, integers: bool = True) -> nn.Module:
    """The values of a weight, from codes where they are on a grid.

    Args:
        site: of the weight.
        weight: (O, I), or another shape.
        flip: as (I, O).
        integers: the other operand of its product has integers too.
    """
    grid = grid_of(site) if isinstance(site, Quantizer) else None
    if grid is not None:
        return WeightCodes(weight, grid, flip, integers)
    values = site(weight).detach()
    return Constant(values.mT.contiguous() if flip else values)


def activation_of(model: nn.Module, name: str, quantizer: Quantizer, keys: KeysOfSites) -> nn.Module:
    """The site of an activation; QatError where it has no ONNX form."""
    if isinstance(quantizer, LogIntSoftmaxQuantizer):
        return SoftmaxSite(quantizer, keys[name])
    if isinstance(quantizer, IntegerNormQuantizer):
        norm: Any = model.get_submodule(name.rpartition(".")[0])
        return NormSite(name, quantizer, norm.weight, norm.bias)
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


class GraphLinear(Folding):
    """A `QuantLinear` with the weight as (I, O): behind a transposition, runtimes see no integers.

    An offset of its input, of one value, is in its bias: offset times the sum of each row of the weight.
    """

    bias: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.input_site, self.output_quant = layer.input_site, layer.output_quant
        offset, bias = getattr(self.input_site, "offset", None), layer.bias.detach().double()
        self.folds = offset is not None and offset.ndim == 0
        integers = isinstance(self.input_site, ActivationSite) and self.input_site.gives_integers
        self.weight = weight_of(layer.weight_quant, layer.weight, flip=True, integers=integers)
        if offset is not None and self.folds:
            bias = bias + offset.double() * exact_values(layer.weight_quant, layer.weight).sum(1)
        self.fold("bias", bias)

    def forward(self, x: Tensor, more_bias: Tensor | None = None) -> Tensor:
        """(..., I) to (..., O)."""
        read = parts_of(self.input_site, x)
        read = past_product(Parts(read.values, read.factor) if self.folds else read, -1)
        read = read if read.offset is None else Parts(read.whole())
        out = read.values @ self.weight()
        if read.factor is not None:
            out = out * read.factor
        found: Tensor = self.output_quant(out + (self.bias if more_bias is None else self.bias + more_bias))
        return found


@torch.no_grad()
def exact_values(site: nn.Module, weight: Tensor) -> Tensor:
    """The values of a weight in float64, whose codes are those of float32."""
    if not isinstance(site, Quantizer):
        return weight.double()
    found: Tensor = copy.deepcopy(site).double()(site(weight).double())
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
        queries, keys = parts_of(self.q_quant, q), parts_of(self.k_quant, k)
        left = queries.values if self.moves["q"] else queries.whole()
        right = keys.values if self.moves["k"] else self._repeat(keys.whole())
        scores = (left @ right.transpose(-2, -1)) * self.score_factor  # (B, H, N, N)
        scores = self.scores_quant(scores)
        probs, values = self._probs(scores, bias, mask, is_causal), parts_of(self.v_quant, v)
        mixed = values.values if self.moves["v"] else self._repeat(values.whole())
        out: Tensor = (probs.values if self.moves["probs"] else probs.whole()) @ mixed
        if self.mix_factor is not None:
            out = out * self.mix_factor
        if self.moves["probs"] and probs.offset is not None:
            sums = mixed.sum(-2, keepdim=True)  # (B, H, 1, D)
            out = out + probs.offset * (sums * values.factor if self.moves["v"] and values.factor is not None else sums)
        return out

    def _probs(self: Any, scores: Tensor, bias: Tensor | None, mask: Tensor | None, is_causal: bool) -> Parts:
        """Probabilities of scores, to which a bias and a mask are added."""
        mask = _additive(mask, is_causal, scores)
        if isinstance(self.probs_quant, SoftmaxSite):
            return Parts(self.probs_quant(scores if bias is None else scores + bias, mask))
        for more in (bias, mask):
            scores = scores if more is None else scores + more
        return parts_of(self.probs_quant, scores.softmax(-1))


def _additive(mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """The mask as a summand of the scores, or None."""
    if is_causal:
        return scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        return torch.where(mask, 0.0, float("-inf"))
    return mask


def as_graph(model: nn.Module, keys: KeysOfSites) -> nn.Module:
    """Replace, in place, every layer, attention and site of a quantized model in evaluation mode.

    Args:
        model: is changed.
        keys: of every softmax in integers.

    Raises:
        QatError: a site has no ONNX form.
    """
    for name, quantizer in list(quantizers(model)):
        if quantizer.layout.batched:
            _replace(model, name, activation_of(model, name, quantizer, keys))
    for module in list(model.modules()):
        if isinstance(module, AttentionSites):
            _use_graph_attention(module)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            _replace(model, name, GraphLinear(module))
        elif isinstance(module, QuantConv2d):
            _replace(model, name, GraphConv2d(module))
    for site in list(weights(model)):  # of no layer: positions
        _replace(model, site.name, weight_of(site.quantizer, site.weight))
    return model


def _use_graph_attention(module: Any) -> None:
    """Give an attention the products above; its class is made of both. Its sites are those of the graph by now."""
    kind, own = type(module), {}
    if hasattr(module, "position_bias") and module.position_bias() is not None:
        double = copy.deepcopy(module).double()
        with torch.no_grad():
            for site in weights(module):  # the table of positions, among others
                parent, _, child = site.name.rpartition(".")
                own_weight = getattr(double.get_submodule(parent), child.removesuffix("_quant"))
                own_weight.copy_(exact_values(site.quantizer, site.weight))
            bias = double.position_bias().detach()
        own["position_bias"] = lambda self: self.constant_bias
    module.__class__ = type(f"Graph{kind.__name__}", (GraphAttention, kind, Folding), own)
    if own:
        module.fold("constant_bias", bias)
    sites = {name: getattr(module, f"{name}_quant") for name in ("q", "k", "v", "probs")}
    module.moves = {name: _moves(name, site) and (name in ("q", "probs") or module.repeats == 1)
                    for name, site in sites.items()}  # fmt: skip
    factors = {name: site.movable for name, site in sites.items() if module.moves[name] and site.movable is not None}
    scale = torch.tensor(float(module.scale), dtype=torch.float64)
    module.fold("score_factor", scale * factors.get("q", 1) * factors.get("k", 1))
    module.mix_factor = None
    if {"v", "probs"} & factors.keys():
        del module.mix_factor
        module.fold("mix_factor", factors.get("v", 1) * factors.get("probs", torch.ones((), dtype=torch.float64)))


def _moves(name: str, site: nn.Module) -> bool:
    """Whether factor and offset of an operand of attention can follow its product: one step, or one for each head."""
    if not isinstance(site, ActivationSite):
        return False
    return (site.offset is None or name == "probs") and (site.scale.ndim == 0 or site.layout.axis == 1)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.eval())
