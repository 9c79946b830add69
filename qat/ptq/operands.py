"""The matrix products of a quantised model, and what their operands look like.

Shapes: B images or windows, H heads, N tokens, D head width, T tokens of all images, C channels, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from qat.models.attention import QuantHeads
from qat.models.layers import QuantConv2d, QuantLinear
from qat.quantizers import LogIntSoftmaxQuantizer


class Form(NamedTuple):
    """One product: for every matrix of a batch, left (n, I) times right (O, I), transposed.

    Args:
        left, right: names of the sites.
        matrices: for both, from the tensor at the site, perhaps with axes before its own, to (..., n, I).
        axes: for both, the axis of that tensor whose parts have rows of their own; None: there is none.
        samples: from what reaches a site of activations to samples along the first axis.
        height: from these, how many rows n of the output belong to one of them.
        weight: the right operand of a layer.
    """

    left: str
    right: str
    matrices: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    axes: tuple[int | None, int | None]
    samples: Callable[[Tensor], Tensor]
    height: Callable[[Tensor], int]
    weight: Tensor | None = None

    @property
    def activations(self) -> tuple[str, ...]:
        """The sites that images reach."""
        return (self.left, self.right) if self.weight is None else (self.left,)


def forms(model: nn.Module) -> list[Form]:
    """The matrix products of a model, but for that of a `LogIntSoftmax` and for convolutions that pad or dilate."""
    found: list[Form] = []
    for name, module in model.named_modules():
        match module:
            case QuantLinear():
                found.append(_linear(name, module))
            case QuantConv2d() if _cuts_patches(module):
                found.append(_conv(name, module))
            case QuantHeads():
                found += _attention(name, module)
    return found


def _linear(name: str, layer: QuantLinear) -> Form:
    """(T, I) and (O, I) to (T, O)."""
    places = f"{name}.input_quant", f"{name}.weight_quant"
    return Form(*places, (_same, _same), (None, 0), lambda x: x.flatten(0, -2), lambda x: 1, layer.weight)


def _conv(name: str, layer: QuantConv2d) -> Form:
    """(B, C, H, W) and (O, C, kh, kw); the output is (T, O)."""
    cut = partial(patches, size=layer.weight.shape[2:], stride=layer.options["stride"])
    matrices = (cut, lambda weight: weight.flatten(-3))
    places = f"{name}.input_quant", f"{name}.weight_quant"
    return Form(*places, matrices, (None, 0), _same, lambda x: len(cut(x[:1])), layer.weight)


def _cuts_patches(layer: QuantConv2d) -> bool:
    """Every output is the product of a patch and its weight; padding would add zeros that are not quantised."""
    options = layer.options
    return options["padding"] in ((0, 0), "valid") and options["groups"] == 1 and options["dilation"] == (1, 1)


def patches(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(..., B, C, H, W) to the patches of a convolution, (..., T, C * kh * kw)."""
    cut = x.unfold(-2, size[0], stride[0]).unfold(-2, size[1], stride[1])  # (..., B, C, H', W', kh, kw)
    return cut.movedim(-5, -3).flatten(-3).flatten(-4, -2)


def _attention(name: str, heads: QuantHeads) -> list[Form]:
    """q (B, H, N, D) and k, without their scale; the probabilities (B, H, N, N) and v, transposed."""
    q, k, probs, v = (f"{name}.{site}_quant" for site in ("q", "k", "probs", "v"))
    scores = Form(q, k, (_same, _same), (1, 1), _same, _tokens)
    if isinstance(heads.probs_quant, LogIntSoftmaxQuantizer):
        return [scores]  # that site sees logits
    return [scores, Form(probs, v, (_same, lambda x: x.mT), (1, 1), _same, _tokens)]


def _same(x: Tensor) -> Tensor:
    return x


def _tokens(x: Tensor) -> int:
    return x.shape[2]
