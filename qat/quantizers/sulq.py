"""Shift-uniform-log2 quantizer for the output of softmax: I&S-ViT (Zhong et al. 2023, arXiv 2311.10126).

The logarithm of a shifted value is quantized evenly, and each exponent is then rounded to an integer:

    y = -log2(x + eta),   code = clip(round((y - low) / step), 0, 2**bits - 1),   e = round(low + code * step)
    value = 2**-e - eta

so that the few codes cover the whole range of exponents. The largest probabilities have code 0. Values can be slightly
negative. The straight-through gradients, with upstream gradient g:

    dx    = g * (value + eta) / (x + eta)   for low <= y <= low + (2**bits - 1) * step,   0 elsewhere
    dstep = -ln 2 sum g * (value + eta) * code, the derivative for fixed codes

Shapes: G groups that share a grid, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers.candidates import TableSpace, least_error, thinned
from qat.quantizers.kernels import wide
from qat.quantizers.layout import Layout
from qat.quantizers.pieces import pieces
from qat.quantizers.quantizer import MIN_STEP, Quantizer
from qat.quantizers.space import Space, Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term, constant, shifted

TINY = torch.finfo(torch.float32).tiny
SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)  # eta, as in the released code


@dataclass(frozen=True)
class SULQ(Spec):
    """Powers of two, less a shift, whose exponents are even steps apart."""

    signed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed:
            raise QatError("signed is True: codes of SULQ are unsigned, leave signed out")

    def build(self, layout: Layout) -> SULQQuantizer:
        """The module."""
        return SULQQuantizer(self, layout)


class SULQQuantizer(Quantizer):
    """The module of `SULQ`: ``step`` (G,), and buffers ``low``, the exponent of code 0, and ``eta`` (G,)."""

    spec: SULQ
    low: Tensor
    eta: Tensor

    def __init__(self, spec: SULQ, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.register_buffer("low", torch.full((layout.groups,), torch.nan))
        self.register_buffer("eta", torch.full((layout.groups,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        out: Tensor = FakeSULQ.apply(x, self.view(self.step, x), *self._constants(x)[1:], self.spec.qmax)
        return out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type; 0 is the largest value."""
        codes = torch.empty(x.shape, dtype=self.code_dtype, device=x.device)
        for part, target, step, low, eta in pieces((x, codes), self._constants(x)):
            target.copy_(_codes(part, step, low, eta, self.spec.qmax))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        return _values(codes.to(self.step.dtype), *self._constants(codes))

    def terms(self, codes: Tensor) -> list[Term]:
        """Powers of two, and the shift."""
        step, low, eta = self._constants(codes)
        exponents = (codes.to(step.dtype) * step + low).round().long()
        least, most = ((self.low + code * self.step.detach()).round().long() for code in (0, self.spec.qmax))
        first = min(0, int(least.min()))  # a value above 1 has a negative exponent
        found, factor = shifted(torch.ones_like(exponents), exponents - first, int(most.max()) - first)
        return [Term(found, step.new_tensor(factor * 2.0**-first)), constant(-eta, codes)]

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The shift with the least squared error on the samples (G, n); exponents cover all of them."""
        self.set_(least_error(self, self._table(samples), samples))

    @torch.no_grad()
    def search_space(self, samples: Tensor) -> Space:
        """Every shift, with the exponents of all samples (G, n)."""
        return TableSpace(self._table(samples))

    def _table(self, samples: Tensor) -> Table:
        x = thinned(samples).float()
        ends = torch.stack([samples.amax(1), samples.amin(1)]).clamp(min=0)  # (2, G)
        eta = torch.tensor(SHIFTS, device=x.device)[:, None].repeat(1, len(samples))
        low, high = (-(end + eta).log2() for end in ends)
        return {"eta": eta, "low": low, "step": ((high - low) / self.spec.qmax).clamp(min=MIN_STEP)}

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.view(self.step.detach(), x), self.view(self.low, x), self.view(self.eta, x)


def _codes(x: Tensor, step: Tensor, low: Tensor, eta: Tensor, top: int) -> Tensor:
    """Codes, in floating point, of values that may be below -eta."""
    y = (x.to(wide(x)) + eta).clamp_(min=TINY).log2_().neg_()
    return y.sub_(low).div_(step).clamp_(0, top).round_()


def _values(codes: Tensor, step: Tensor, low: Tensor, eta: Tensor) -> Tensor:
    return torch.exp2(-(codes * step + low).round_()) - eta


class FakeSULQ(torch.autograd.Function):
    """Quantize and dequantize; keeps only ``x`` for backward and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Tensor, eta: Tensor, top: int) -> Tensor:
        """Values, in the dtype of ``x``."""
        ctx.save_for_backward(x, step, low, eta)
        ctx.top = top
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, target, one, first, shift in pieces((x, out), (step, low, eta)):
            target.copy_(_values(_codes(part, one, first, shift, top), one, first, shift))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``step`` (equations at the top of the file)."""
        x, *constants = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=grads[0].dtype, device=x.device)
        d_step = torch.empty(x.shape, dtype=wide(x), device=x.device)
        for part, grad, d, slope, step, low, eta in pieces((x, grads[0], d_x, d_step), constants):
            shifted = (part.to(wide(part)) + eta).clamp_(min=TINY)
            y = (-shifted.log2() - low) / step
            codes = _codes(part, step, low, eta, ctx.top)
            power = _values(codes, step, low, eta) + eta
            d.copy_(grad * power / shifted * ((y >= 0) & (y <= ctx.top)))
            torch.mul(power * codes, grad * -log(2), out=slope)
        return d_x, d_step.sum_to_size(constants[0].shape), None, None, None
