"""Layers and attention that multiply integers. Shapes: B batch, N tokens, I inputs, O outputs, H heads, D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.integer.coded import CodedTensor, Operand, plain_tensor
from qat.integer.products import Accumulators, convolution, matrix_product
from qat.models.attention import AttentionSites, additive
from qat.models.layers import QuantConv2d, QuantLinear
from qat.quantizers import Quantizer
from qat.sites.insert import quantizers, raise_for_uncalibrated


class IntegerSite(nn.Module):
    """The site of an operand of a product: it gives what its codes stand for.

    Args:
        quantizer: calibrated.
    """

    quantizer: Quantizer

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, *args: Any) -> Operand:
        """Of what the quantizer is given."""
        return Operand(self.quantizer.terms(self.quantizer.encode(*args)), self.quantizer.spec)


class CodedSite(IntegerSite):
    """A site that no product reads directly: its values remember their codes, for a product that they are moved to."""

    @property
    def enabled(self) -> bool:
        """Always, here."""
        return True

    def forward(self, *args: Any) -> Any:
        """The values of what the quantizer is given."""
        codes = self.quantizer.encode(*args)
        operand = Operand(self.quantizer.terms(codes), self.quantizer.spec)
        return CodedTensor.of(self.quantizer.decode(codes).to(args[0].dtype), operand)

    def coded(self, values: Tensor) -> CodedTensor:
        """Values that the site has given, with their codes; to quantize them again changes nothing."""
        return CodedTensor.of(values, Operand(self.quantizer.terms(self.quantizer.encode(values)), self.quantizer.spec))


class IntegerWeight(nn.Module):
    """The codes of a weight.

    Args:
        quantizer: of the weight.
        weight: the latent weight, or the values that it has after quantization.
    """

    quantizer: Quantizer
    codes: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("codes", quantizer.encode(weight.detach()))

    def forward(self, weight: Tensor) -> Operand:
        """What they stand for; the weight is not read."""
        return Operand(self.quantizer.terms(self.codes), self.quantizer.spec)


def operand_of(found: Operand | Tensor) -> Operand | Tensor:
    """What a site gives; where it is in floating point, the codes that the tensor has from before, if any."""
    if isinstance(found, CodedTensor):
        return found.as_subclass(Tensor) if found.operand is None else found.operand
    return found


def product(a: Operand | Tensor, b: Operand | Tensor, noted: Accumulators) -> Tensor:
    """a times the transpose of b; one of floats where one of them is in floating point."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        noted.note_floats()
        left, right = (side if isinstance(side, Tensor) else side.whole() for side in (a, b))
        return left @ right.mT
    return matrix_product(a, b, noted)


def changed(found: Operand | Tensor, change: Callable[[Tensor], Tensor]) -> Operand | Tensor:
    """The operand, moved or repeated."""
    return change(found) if isinstance(found, Tensor) else found.changed(change)


class IntegerLinear:
    """Comes before a class of linear layers."""

    def forward(self: Any, x: Tensor, more_bias: Tensor | None = None) -> Tensor:
        """As `QuantLinear.forward`."""
        out = product(operand_of(self.input_site(x)), self.weight_quant(self.weight), self.accumulators)
        found: Tensor = self.output_quant(out + (self.bias if more_bias is None else self.bias + more_bias))
        return found


class IntegerConv2d:
    """Comes before a class of convolutions. Zeros of the padding are the integer 0, and no offset is added to them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As `QuantConv2d.forward`."""
        read, weight = operand_of(self.input_quant(x)), self.weight_quant(self.weight)
        if isinstance(read, Tensor):
            self.accumulators.note_floats()
            out = F.conv2d(read, weight.whole(), **self.options)
        else:
            out = convolution(read, weight, self.options, self.accumulators)
        found: Tensor = self.output_quant(out if self.bias is None else out + self.bias.view(-1, 1, 1))
        return found


class IntegerAttention:
    """Comes before a class of attention: both of its products."""

    def attend(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `AttentionSites.attend`."""
        keys, mixed = (changed(operand_of(site(x)), self._shared) for site, x in ((self.k_quant, k), (self.v_quant, v)))
        scores = product(operand_of(self.q_quant(q)), keys, self.score_accumulators) * self.scale
        scores = plain_tensor(self.scores_quant(scores))
        mask = additive(mask, is_causal, scores)
        if self.softmax_is_quantized:
            probs = self.probs_quant(scores if bias is None else scores + bias, mask)
        else:
            for more in (bias, mask):
                scores = scores if more is None else scores + more
            probs = self.probs_quant(scores.softmax(-1))
        return product(operand_of(probs), changed(mixed, lambda x: x.mT), self.mix_accumulators)

    def _shared(self: Any, x: Tensor) -> Tensor:
        """One for every head of queries; a single one is broadcast."""
        found: Tensor = x if x.shape[1] == 1 else self._repeat(x)
        return found

    @property
    def softmax_is_quantized(self: Any) -> bool:
        """As `AttentionSites.softmax_is_quantized`, of the quantizer behind the site."""
        site = self.probs_quant
        return isinstance(site, IntegerSite) and site.quantizer.replaces_softmax


@torch.no_grad()
def use_integers(model: nn.Module) -> nn.Module:
    """Let every product of a quantized model in evaluation mode, both of whose operands have codes, be one of integers.

    Args:
        model: is changed.

    Raises:
        QatError: a quantizer is not calibrated, or has no form in whole numbers; the products are integer already.
    """
    if any(isinstance(module, IntegerSite | IntegerWeight) for module in model.modules()):
        raise QatError("the products of this model are integer already")
    raise_for_uncalibrated(model)
    known = {name: quantizer for name, quantizer in quantizers(model) if quantizer.enabled}
    for name, quantizer in known.items():
        if type(quantizer).terms is Quantizer.terms and quantizer.affine() is None:
            raise QatError(
                f"site {name!r} has {quantizer.spec}, which does not say what its codes stand for: give "
                f"{type(quantizer).__name__} a method `terms`, see qat/quantizers/terms.py"
            )
    for name, module in list(model.named_modules()):
        place = f"{name}." if name else ""
        if isinstance(module, QuantLinear | QuantConv2d) and f"{place}weight_quant" in known:
            reads = module.input_name if isinstance(module, QuantLinear) else "input_quant"
            weight = IntegerWeight(known.pop(f"{place}weight_quant"), module.weight)
            kind = IntegerLinear if isinstance(module, QuantLinear) else IntegerConv2d
            _become(module, kind, weight_quant=weight, accumulators=Accumulators())
            _replace(model, known, f"{place}{reads}", IntegerSite)
        elif isinstance(module, AttentionSites):
            _become(module, IntegerAttention, score_accumulators=Accumulators(), mix_accumulators=Accumulators())
            for operand in ("q", "k", "v", "probs"):
                _replace(model, known, f"{place}{operand}_quant", IntegerSite)
    for name, quantizer in list(known.items()):
        if quantizer.layout.batched and quantizer.layout.groups == 1:
            _replace(model, known, name, CodedSite)
    return model


def _replace(model: nn.Module, known: dict[str, Quantizer], name: str, kind: type[IntegerSite]) -> None:
    """Put another site in the place of a quantizer, if there is one."""
    if name in known:
        model.set_submodule(name, kind(known.pop(name)))


def _become(module: nn.Module, mixin: type, **attributes: object) -> None:
    """Give a module the methods of another class, before its own, and what they need."""
    kind = type(module)
    module.__class__ = type(f"Integer{kind.__name__}", (mixin, kind), {})
    for name, value in attributes.items():
        setattr(module, name, value)
