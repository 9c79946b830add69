"""Leading-one detection for the output of softmax: BitLog2 (github.com/jiho264/BitLog2), with and without a half bit.

    x = clip(floor(p * R), 0, R - 1),   value = (x cut to its leading one and m bits below it) / D

m is 0 (``single``) or 1 (``half``). The values are those of an unsigned minifloat with m mantissa bits and
subnormals, so that code 0 is zero, the codes are consecutive, and R is the value of the first code that does not exist.
Cutting always rounds down; the divisor D < R makes up for it. The straight-through gradients, upstream gradient g:

    dx    = g                for 0 <= p <= 1: next to zero the values are evenly spaced, so zero is no clipping
    dstep = sum g * D * value, the derivative for fixed codes, of step = 1 / D

Shapes: G groups that share a divisor, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers import kernels
from qat.quantizers.blocks import blocks
from qat.quantizers.layout import Layout
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term

Form = Literal["single", "half"]
MAX_BITLOG_BITS = 4
MANTISSA = 23  # bits of a float32


@dataclass(frozen=True)
class BitLog2(Spec):
    """Codes for zero and the powers of two, from compare and shift of an integer probability.

    Args:
        form: ``single``: 0, 1, 2, 4, 8 and so on. ``half``: also halfway between, 0, 1, 2, 3, 4, 6, 8, 12 and so on.
        extra: one code more than ``2**bits``, as the 17-symbol schemes of the repository: more than 4 bits.
    """

    signed: bool = False
    form: Form = "half"
    extra: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("form", Form)
        if self.signed:
            raise QatError("signed is True: codes of BitLog2 are unsigned, leave signed out")
        if isinstance(self.bits, int) and self.bits > MAX_BITLOG_BITS:
            raise QatError(
                f"bits is {self.bits}: give BitLog2 at most {MAX_BITLOG_BITS} (its integers have up to 2**bits bits), "
                "or choose LogSqrt2"
            )

    @property
    def kept(self) -> int:
        """m: bits kept below the leading one."""
        return 1 if self.form == "half" else 0

    @property
    def levels(self) -> int:
        """``2**bits``, and one more for the schemes that have it."""
        return int(2**self.width) + self.extra

    @property
    def reach(self) -> int:
        """R: the probability 1 as an integer; the largest that occurs is one less."""
        one = 1 << self.kept
        return (one + self.levels % one) << (self.levels // one - 1)

    def build(self, layout: Layout) -> BitLog2Quantizer:
        """The module."""
        return BitLog2Quantizer(self, layout)


class BitLog2Quantizer(Quantizer):
    """The module of `BitLog2`: parameter ``step`` (G,), the reciprocal of the divisor, so value = integer * step."""

    spec: BitLog2

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        out: Tensor = FakeBitLog2.apply(x, self.view(self.step, x), self.spec)
        return out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type."""
        return leading_codes(scaled_floor(x, self.spec).int(), self.spec.kept).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        return integers(codes.int(), self.spec.kept).to(self.step.dtype) * self.view(self.step, codes)

    def terms(self, codes: Tensor) -> list[Term]:
        """The integer of each code: one leading bit, and the kept ones, shifted."""
        return [Term(integers(codes.long(), self.spec.kept), self.view(self.step.detach(), codes))]

    @property
    def divisor(self) -> Tensor:
        """D (G,): what the integers are divided by."""
        return 1 / self.step.detach()

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The divisor with the smallest squared error on the samples (G, n)."""
        self.step.copy_(1 / best_divisor(samples, self.spec))


def scaled_floor(x: Tensor, spec: BitLog2) -> Tensor:
    """The integers clip(floor(x * R), 0, R - 1), below 2**16 and so exact, as a dense new float32 tensor."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()  # dense: a product would copy it otherwise
    return (x * spec.reach).clamp_(0, spec.reach - 1).floor_().float()


def leading_codes(x: Tensor, kept: int) -> Tensor:
    """Codes of integers 0 <= x < 2**16, found by comparing and shifting integers."""
    rest, exponent = x, torch.zeros_like(x)
    for log in (3, 2, 1, 0):  # halves of the 16 bits: shift by 8, 4, 2, 1 where the leading one is that high
        far = (rest >= 1 << ((1 << log) + kept)).to(x.dtype) << log
        rest, exponent = rest >> far, exponent + far
    return (exponent << kept) + rest  # rest is the leading one and the kept bits, or x itself where it is short


def integers(codes: Tensor, kept: int) -> Tensor:
    """The integer that a code stands for."""
    exponent, low = codes >> kept, codes & ((1 << kept) - 1)
    leading = (exponent > 0).to(codes.dtype) << kept
    return (leading + low) << (exponent - 1).clamp(min=0)


def leading_values(x: Tensor, spec: BitLog2) -> Tensor:
    """The integers of the codes of ``x``, float32: cutting an integer is dropping mantissa bits of a float."""
    out = scaled_floor(x, spec)
    out.view(torch.int32).bitwise_and_(-1 << (MANTISSA - spec.kept))
    return out


def best_divisor(samples: Tensor, spec: BitLog2) -> Tensor:
    """The integer D (G,), from the largest value to R - 1, that minimizes sum (p - value / D)**2 of samples (G, n).

    The repository tries every integer; as a function of 1 / D the error is a parabola with its minimum at
    D = sum value**2 / sum p * value, so one of the two integers next to that is the best.
    """
    values = leading_values(samples, spec).double()
    square, cross = values.square().sum(1), (samples * values).sum(1)  # (G,)
    ideal = torch.where(cross > 0, square / cross, spec.reach - 1)  # all zero: any divisor will do
    ideal = ideal.clamp(values.amax(1), torch.full_like(ideal, spec.reach - 1))
    low, high = ideal.floor(), ideal.ceil()
    return torch.where(_error(high, square, cross) < _error(low, square, cross), high, low)


def _error(divisor: Tensor, square: Tensor, cross: Tensor) -> Tensor:
    """The squared error without sum p**2, which no divisor changes."""
    return (square / divisor - 2 * cross) / divisor


class FakeBitLog2(torch.autograd.Function):
    """Quantize and dequantize; keeps only ``x`` for backward and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, spec: BitLog2) -> Tensor:
        """Values, in the dtype of ``x``."""
        ctx.save_for_backward(x, step)
        ctx.spec = spec
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, target in blocks((x, out), (step,)):
            torch.mul(leading_values(part, spec), step, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``step`` (equations at the top of the file)."""
        x, step = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=grads[0].dtype, device=x.device)
        d_step = torch.empty(x.shape, dtype=kernels.wide(grads[0]), device=x.device)
        for part, grad, d, slope in blocks((x, grads[0], d_x, d_step), (step,)):
            torch.mul(grad, (part >= 0) & (part <= 1), out=d)
            torch.mul(leading_values(part, ctx.spec), grad, out=slope)
        return d_x, d_step.sum_to_size(step.shape), None
