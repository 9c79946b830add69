"""Which operations of a model are integer, and which are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from qat.integer.modules import CodedSite, IntegerAttention
from qat.integer.products import Accumulators
from qat.models.layers import QuantConv2d, QuantLayerNorm, QuantLinear, QuantRmsNorm
from qat.quantizers import IntegerNorm

PRODUCTS = (LINEAR := "linear", CONVOLUTION := "convolution", SCORES := "q k", MIXED := "probabilities v")


class Operation(NamedTuple):
    """An operation.

    Args:
        name: of its module.
        what: it computes.
        integer: without any floating-point operation, up to the scale and the bias that follow a product.
        operands: of a product of integers.
        sums: of integers for one output of it, and
        bits: of their accumulators, once images have passed.
    """

    name: str
    what: str
    integer: bool
    operands: str = ""
    sums: int = 0
    bits: int = 0

    @property
    def is_product(self) -> bool:
        """A layer, or a product of attention."""
        return self.what in PRODUCTS


def rows(model: nn.Module) -> Iterator[Operation]:
    """Every product, softmax, norm and activation function, in the order of the modules.

    Args:
        model: that multiplies integers and has seen images.
    """
    for name, module in model.named_modules():
        if isinstance(module, IntegerAttention):
            kind: Any = module
            yield _product(f"{name}.scores", SCORES, kind.score_accumulators)
            yield Operation(name, "softmax", kind.softmax_is_quantized)
            yield _product(f"{name}.mixed", MIXED, kind.mix_accumulators)
        if isinstance(module, QuantLinear | QuantConv2d):
            what = LINEAR if isinstance(module, QuantLinear) else CONVOLUTION
            yield _product(name, what, getattr(module, "accumulators", None))
        if isinstance(module, QuantLayerNorm | QuantRmsNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            yield Operation(name, "norm", isinstance(module, QuantLayerNorm) and _computes_with_integers(module))
        if type(module).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations")):
            yield Operation(name, type(module).__name__, False)


def _computes_with_integers(norm: QuantLayerNorm) -> bool:
    """Whether a norm is an `IntegerNorm`, and that one with integers alone."""
    spec = norm.output_quant.quantizer.spec if isinstance(norm.output_quant, CodedSite) else None
    return bool(norm.source) and isinstance(spec, IntegerNorm) and spec.arithmetic == "integer"


def _product(name: str, what: str, noted: Accumulators | None) -> Operation:
    """The row of a product."""
    if noted is None or noted.floats or not noted.products:
        return Operation(name, what, False)
    return Operation(name, what, True, noted.operands, noted.products, noted.bits)
