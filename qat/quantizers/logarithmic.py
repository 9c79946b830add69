"""Logarithm to base sqrt2, for the output of softmax: RepQ-ViT (Li et al. 2023, arXiv 2212.08254), section 3.3.

    t = round(-2 log2(x / step)),   code = clip(t, 0, last power),   value = step * 2**(-code / 2),   0 for large t

With y = 2**(1/4) x / step the formula asks for the largest 2**(-t/2) that is at most y. That is the larger of y cut to
a power of two, and sqrt2 times y / sqrt2 cut to a power of two: no logarithm, the same wherever arithmetic follows
IEEE 754, and equal to the formula but for the floats next to an irrational boundary.
The straight-through gradients, with upstream gradient g:

    dx    = g                     where the value is not 0 and x <= 2**(1/4) step, so that no code was clipped
    dstep = sum g * value / step, the derivative for fixed codes

A softmax row sums to one, so dstep grows with the rows and not with their length, and takes no gain.
Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers import kernels
from qat.quantizers.blocks import blocks
from qat.quantizers.integers import FIELDS
from qat.quantizers.layout import Layout
from qat.quantizers.quantizer import MIN_STEP, Quantizer
from qat.quantizers.space import Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term, shifted

LogZero = Literal["last", "extra", "rounded"]
MAX_LOG_BITS = 8  # the smallest value is step * 2**-127 already: float32 has nothing below


@dataclass(frozen=True)
class LogSqrt2(Spec):
    """Code c stands for ``2**(-c/2)`` of the step; one code stands for zero.

    Args:
        zero: which code stands for zero. ``last``: the last of ``2**bits``. ``extra``: one more than ``2**bits``, as
            released RepQ-ViT has it (4 bits have 17 levels). ``rounded``: the last, but what lies up to half a code
            beyond the last power is rounded up to it (``Sqrt2_16`` of the BitLog2 repository).
    """

    signed: bool = False
    zero: LogZero = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("zero", LogZero)
        if self.signed:
            raise QatError("signed is True: codes of LogSqrt2 are unsigned, leave signed out")
        if isinstance(self.bits, int) and self.bits > MAX_LOG_BITS:
            raise QatError(f"bits is {self.bits}: give LogSqrt2 at most {MAX_LOG_BITS}, or choose Uniform")

    @property
    def powers(self) -> int:
        """How many codes stand for a power; the code that follows them stands for zero."""
        return int(2**self.width) - (self.zero != "extra")

    @property
    def cutoff(self) -> int:
        """The smallest t whose value is zero."""
        return self.powers + (self.zero == "rounded")

    @property
    def levels(self) -> int:
        """``2**bits``, and one more for an extra zero."""
        return self.powers + 1

    def build(self, layout: Layout) -> LogSqrt2Quantizer:
        """The module."""
        return LogSqrt2Quantizer(self, layout)


class LogSqrt2Quantizer(Quantizer):
    """The module of `LogSqrt2`: parameter ``step`` (G,), the value of code 0."""

    spec: LogSqrt2
    ranged = True

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        out: Tensor = FakeLogSqrt2.apply(x, self.view(self.step, x), self.spec)
        return out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type; a negative value has the code of zero."""
        root = roots(x, self.view(self.step, x), self.spec)
        integer, mantissa, bias = FIELDS[root.dtype]
        halves = (root.view(integer) + (1 << mantissa - 3)) >> mantissa - 1  # sqrt2 = 1.41 becomes 1.54: a set bit
        return (2 * bias - halves).clamp_(0, self.spec.powers).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        table = torch.tensor([2.0**-t for t in range(self.spec.powers)] + [0.0], dtype=torch.float64).sqrt()
        return table.to(self.step)[codes.int()] * self.view(self.step, codes)

    def terms(self, codes: Tensor) -> list[Term]:
        """Powers of two for even codes, and times 1 / sqrt2 for odd ones: two products."""
        codes, step = codes.long(), self.view(self.step.detach(), codes)
        powers, deepest = torch.ones_like(codes).where(codes < self.spec.powers, 0), (self.spec.powers - 1) // 2
        found, factor = shifted(powers, codes // 2, deepest)
        even = codes % 2 == 0
        return [Term(found.where(even, 0), step * factor), Term(found.where(~even, 0), step * (factor / sqrt(2)))]

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The largest of the samples (G, n)."""
        self.set_range_(samples.amin(1), samples.amax(1))

    @torch.no_grad()
    def from_range(self, low: Tensor, high: Tensor) -> Table:
        """Code 0 stands for ``high``; the smallest value follows from it."""
        return {"step": high.clamp(min=MIN_STEP)}


def root_dtype(x: Tensor, spec: LogSqrt2) -> torch.dtype:
    """float64 where ``x`` or the codes need it: 2**-127 is no normal float32, so its exponent could not be read."""
    return torch.float64 if spec.width == MAX_LOG_BITS else kernels.wide(x)


def roots(x: Tensor, step: Tensor, spec: LogSqrt2) -> Tensor:
    """value / step: a dense new tensor of `root_dtype`."""
    x = x.to(root_dtype(x, spec))
    even = kernels.scaled(x, step * 2**-0.25, None).clamp_(0, 1)  # y; 1 is code 0
    odd = even * sqrt(0.5)
    integer, mantissa, _ = FIELDS[even.dtype]
    for part in (even, odd):
        part.view(integer).bitwise_and_(-1 << mantissa)  # keeps the exponent only
    out = torch.maximum(even, odd.mul_(sqrt(2)), out=even)
    smallest = 2 ** (-(spec.cutoff - 0.5) / 2)  # between the last t that is not zero and the first that is
    if spec.zero != "rounded":
        return F.threshold(out, smallest, 0, inplace=True)
    keep = out > smallest
    return out.clamp_(min=2 ** (-(spec.powers - 1) / 2)).mul_(keep)


class FakeLogSqrt2(torch.autograd.Function):
    """Quantize and dequantize; keeps only ``x`` for backward and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, spec: LogSqrt2) -> Tensor:
        """Values, in the dtype of ``x``."""
        ctx.save_for_backward(x, step)
        ctx.spec = spec
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, target in blocks((x, out), (step,)):
            root = roots(part, step, spec).to(kernels.wide(x))  # before the product, as in decode
            torch.mul(root, step, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``step`` (equations at the top of the file)."""
        x, step = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=grads[0].dtype, device=x.device)
        d_step = torch.empty(x.shape, dtype=root_dtype(x, ctx.spec), device=x.device)
        for part, grad, d, slope in blocks((x, grads[0], d_x, d_step), (step,)):
            root = roots(part, step, ctx.spec)
            torch.mul(grad, (root > 0) & (part <= step * 2**0.25), out=d)
            torch.mul(root, grad, out=slope)
        return d_x, d_step.sum_to_size(step.shape), None
