"""Sites whose codes depend on a whole row, as operators of ONNX: the softmax and the LayerNorm of FQ-ViT, in integers.

Their integers are float64, as in `qat.quantizers.integers`, where that is exact; a root that needs more bits is
corrected in int64. What a processor finds by shifting and comparing is found among thresholds.
Shapes: B batch, H heads, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.export.graph.grid import Grid
from qat.export.graph.ladder import filled, gather, places
from qat.export.graph.sites import ActivationSite, clip, dequantize_linear, quantize_linear
from qat.quantizers import IntegerNormQuantizer, LogIntSoftmaxQuantizer
from qat.quantizers.integer_norm import MANTISSA, POINT, ROOT, fixed_point
from qat.quantizers.integers import EXACT_BITS
from qat.quantizers.log_int_softmax import LONGEST
from qat.sites.hooks import watching
from qat.sites.insert import quantizers


class Keys(NamedTuple):
    """What a softmax is given.

    Args:
        length: of a row.
        masked: whether a mask is added.
    """

    length: int
    masked: bool


KeysOfSites = Mapping[str, Keys]  # by the name of the site


@contextmanager
def keys_of(model: nn.Module) -> Iterator[dict[str, Keys]]:
    """The rows of every softmax in integers that a forward inside the block reaches.

    Raises:
        QatError: a softmax is given rows of several lengths.
    """
    found: dict[str, Keys] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        given = Keys(args[0].shape[-1], len(args) > 1 and args[1] is not None)
        if found.setdefault(name, given) != given:
            raise QatError(
                f"site {name!r} is given rows of several lengths, for which LogIntSoftmax has no ONNX form: choose "
                "another quantizer there, or --format safetensors"
            )

    with watching({name: q for name, q in quantizers(model) if q.replaces_softmax}, before=note):
        yield found


class SoftmaxSite(nn.Module):
    """In the place of a softmax: powers of two.

    Args:
        quantizer: calibrated.
        given: what it is given, on which the exponentials depend.
    """

    step: Tensor
    exps: Tensor
    thresholds: Tensor
    values: Tensor

    def __init__(self, quantizer: LogIntSoftmaxQuantizer, given: Keys) -> None:
        super().__init__()
        spec, zero = quantizer.spec, float(quantizer.zero_point)
        self.low, self.high = -zero, 2.0**spec.logit_bits - 1 - zero
        exps, farthest = quantizer.exponentials(given.length, LONGEST if given.masked else 2**spec.logit_bits)
        self.reach = float(farthest) + 2**spec.logit_bits
        values = quantizer.decode(torch.arange(spec.levels))
        thresholds = filled(1.5 * torch.arange(spec.levels - 1, dtype=torch.float64).exp2())  # where a power is next
        self.register_buffer("step", quantizer.step.detach()[0])
        self.register_buffer("exps", exps)
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("values", torch.cat([values, values[-1:].expand(len(thresholds) + 1 - len(values))]))

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities (B, H, N, N) of scores, to which a mask is added."""
        x = (scores / self.step).clamp(self.low, self.high).round()
        if mask is not None:
            x = x + (mask / self.step).clamp(-self.reach, self.reach).round()
        distances = (x.amax(-1, keepdim=True) - x).clamp(0, len(self.exps) - 1).long()
        E = gather(self.exps, distances)
        v = (E.sum(-1, keepdim=True) / E + 0.5).floor()
        return gather(self.values, places(v, self.thresholds))


class NormSite(ActivationSite):
    """The output of a LayerNorm that computes with integers; it gives them to QuantizeLinear.

    Args:
        name: of the site.
        quantizer: calibrated.
        gamma, beta: weight and bias of the norm (C,), if it has them.
    """

    G: Tensor
    B: Tensor
    thresholds: Tensor
    units: Tensor
    norm_step: Tensor

    def __init__(self, name: str, quantizer: IntegerNormQuantizer, gamma: Tensor | None, beta: Tensor | None) -> None:
        if quantizer.spec.arithmetic != "integer":
            raise QatError(
                f"site {name!r} has {quantizer.spec}, for which there is no ONNX form: choose arithmetic: integer"
            )
        step, zero = quantizer.step.detach(), quantizer.zero_point
        one = torch.ones_like(step)
        super().__init__(name, Grid(one, -zero, quantizer.spec.qmax - zero, None, quantizer.layout))
        gamma, beta = (
            torch.ones_like(step) if gamma is None else gamma,
            torch.zeros_like(step) if beta is None else beta,
        )
        G, B = fixed_point(gamma.detach().double() / step.double(), beta.detach().double() / step.double())
        powers = torch.arange(MANTISSA, EXACT_BITS, dtype=torch.float64).exp2()
        thresholds = filled(powers)
        units = torch.cat([torch.ones(1, dtype=torch.float64), powers / 2 ** (MANTISSA - 1)])  # of the bits that stay
        self.register_buffer("norm_step", step[0])
        self.register_buffer("G", G)
        self.register_buffer("B", B)
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("units", torch.cat([units, units[-1:].expand(len(thresholds) + 1 - len(units))]))

    def forward(self, y: Tensor, integers: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        """The values (..., C) that follow from integers (..., C); the other arguments are not read."""
        I = integers.double()  # noqa: E741  as in the equations
        C = I.shape[-1]
        S = I.sum(-1, keepdim=True)
        V = C * (I * I).sum(-1, keepdim=True) - S * S
        quotient = self.G / root(V * 2.0 ** (2 * ROOT)).clamp(min=1)
        size = quotient.abs().floor()
        unit = gather(self.units, places(size, self.thresholds))
        factor = (size / unit).floor() * unit * quotient.sign()
        rounded = ((I * (C * 2.0**-POINT) - S * 2.0**-POINT) * factor + self.B).floor()
        rounded = rounded.to(y.dtype)
        if not self.is_plain:
            return self.parts(rounded).whole() * self.norm_step
        codes = quantize_linear(rounded, self.scale, self.zero, self.name)
        if self.least is not None:
            codes = clip(codes, cast(Any, self.least), cast(Any, self.most))
        return dequantize_linear(codes, self.norm_step, self.zero)


def root(x: Tensor) -> Tensor:
    """The integer part of the square root of whole numbers below 2**62 in float64, float64."""
    exact, found = x.long(), x.sqrt().floor().long()  # of one that has more than 53 bits: off by one at most
    found = found - (found * found > exact).long()
    return (found + ((found + 1) * (found + 1) <= exact).long()).double()
