"""Two uniform grids for the output of GELU, one for each sign: PTQ4ViT (Yuan et al., ECCV 2022, arXiv 2111.12293).

    value = clip(round(x / step), 0, q - 1) * step            where x >= 0,   q = 2**(bits - 1)
    value = clip(round(x / negative), -last, 0) * negative    where x < 0

The negative step is fixed: its grid reaches the least value of GELU. The step of positive values is 2**m negative
steps, so that two integer products, one for each sign, are aligned by a shift of m bits; the released code leaves it
free. The straight-through gradients, with upstream gradient g:

    dx    = g            for -last * negative <= x <= (q - 1) * step
    dstep = sum g * value / step where x >= 0, the derivative for fixed codes

Shapes: G groups that share a step, n values in a group, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers.candidates import TableSpace
from qat.quantizers.kernels import scaled, wide
from qat.quantizers.layout import Layout
from qat.quantizers.pieces import pieces
from qat.quantizers.quantizer import MIN_STEP, Quantizer
from qat.quantizers.space import Space, Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term

Ratio = Literal["power", "free"]
DEPTH = 0.16997124703522  # minus the least value of GELU, as released
SHIFTS = 20  # exponents m from 0 to 19


@dataclass(frozen=True)
class TwinGelu(Spec):
    """A grid for values below zero and one for the others.

    Args:
        ratio: of both steps. ``power``: a power of two; a code is a sign bit, 1 for positive, and a magnitude, so there
            are two zeros. ``free``: any number, as released; the magnitude of negative values may be q, and is stored
            as its complement, as in integers of two's complement.
    """

    signed: bool = False
    ratio: Ratio = "power"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("ratio", Ratio)
        if self.signed:
            raise QatError("signed is True: codes of TwinGelu begin at 0, leave signed out")

    @property
    def holds_negatives(self) -> bool:
        """Down to the least value of GELU."""
        return True

    @property
    def half(self) -> int:
        """q: how many codes are not for negative values."""
        return int(2 ** (self.width - 1))

    @property
    def last(self) -> int:
        """The largest magnitude of a negative value."""
        return self.half - (self.ratio == "power")

    def build(self, layout: Layout) -> TwinGeluQuantizer:
        """The module."""
        return (PowerQuantizer if self.ratio == "power" else TwinGeluQuantizer)(self, layout)


class TwinGeluQuantizer(Quantizer):
    """The module of `TwinGelu`: parameter ``step`` (G,) of positive values, and buffer ``negative`` (G,)."""

    spec: TwinGelu
    negative: Tensor
    ranged = True

    def __init__(self, spec: TwinGelu, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.register_buffer("negative", torch.full((layout.groups,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        step, negative = self.view(self.step, x), self.view(self.negative, x)
        out: Tensor = FakeTwinGelu.apply(x, step, negative, self.spec.half, self.spec.last)
        return out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type."""
        codes = torch.empty(x.shape, dtype=self.code_dtype, device=x.device)
        steps = self.view(self.step, x), self.view(self.negative, x)
        for part, target, above, below in pieces((x, codes), steps):
            high, low = magnitudes(part, above, below, self.spec.half, self.spec.last)
            target.copy_(self._packed(high, low, part < 0))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        signed = self.signed_magnitudes(codes).to(self.step.dtype)
        return signed * torch.where(signed < 0, self.view(self.negative, codes), self.view(self.step, codes))

    def terms(self, codes: Tensor) -> list[Term]:
        """Both signs apart: two products."""
        signed = self.signed_magnitudes(codes)
        step, negative = self.view(self.step.detach(), codes), self.view(self.negative, codes)
        return [Term(signed.clamp(min=0), step), Term(signed.clamp(max=0), negative)]

    def signed_magnitudes(self, codes: Tensor) -> Tensor:
        """Whole numbers, int64: multiples of the step of their own sign.

        Args:
            codes: in the shape of the tensor they came from.
        """
        return codes.long() - self.spec.half

    def _packed(self, high: Tensor, low: Tensor, below: Tensor) -> Tensor:
        return high.add_(low).add_(self.spec.half)

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The full range of the samples (G, n)."""
        self.set_range_(samples.amin(1), samples.amax(1))

    @torch.no_grad()
    def from_range(self, low: Tensor, high: Tensor) -> Table:
        """The last positive value is half a step below ``high``, as released; ``low`` is that of GELU."""
        step = (high / (self.spec.half - 0.5)).clamp(min=MIN_STEP)
        return {"step": step, "negative": torch.full_like(step, DEPTH / self.spec.half)}


class PowerQuantizer(TwinGeluQuantizer):
    """The step is 2**m negative steps."""

    def signed_magnitudes(self, codes: Tensor) -> Tensor:
        """As `TwinGeluQuantizer.signed_magnitudes`."""
        codes, half = codes.long(), self.spec.half
        return torch.where(codes < half, -codes, codes - half)

    def _packed(self, high: Tensor, low: Tensor, below: Tensor) -> Tensor:
        return high.sub_(low).add_(~below, alpha=self.spec.half)

    def terms(self, codes: Tensor) -> list[Term]:
        """Multiples of the negative step: m bits to the left where they are positive."""
        signed = self.signed_magnitudes(codes)
        bits = self.view(self.exponents, codes)
        return [Term(torch.where(signed > 0, signed << bits, signed), self.view(self.negative, codes))]

    @property
    def exponents(self) -> Tensor:
        """m (G,), int64."""
        return exponents(self.step.detach(), self.negative)

    @torch.no_grad()
    def from_range(self, low: Tensor, high: Tensor) -> Table:
        """The smallest step that reaches ``high``, up to half a step."""
        free = super().from_range(low, high)
        m = (free["step"] / free["negative"]).log2().sub(1e-6).ceil().clamp(0, SHIFTS - 1)  # the logarithm is rounded
        return {**free, "step": free["negative"] * powers(m)}

    @torch.no_grad()
    def set_(self, row: Table) -> None:
        """Give the parameters the values (G,) of a row, and round the ratio of the steps to a power of two."""
        super().set_(row)
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """The nearest ratio that is a power of two; an optimizer has to cross the border between two of them."""
        self.step.copy_(self.negative * powers(self.exponents))

    @torch.no_grad()
    def search_space(self, samples: Tensor) -> Space:
        """Every exponent."""
        m = torch.arange(SHIFTS, device=self.step.device)[:, None]
        negative = self.negative.repeat(SHIFTS, 1)  # (K, G)
        return TableSpace({"step": negative * powers(m), "negative": negative})


def exponents(step: Tensor, negative: Tensor) -> Tensor:
    """m, int64, of the nearest ratio that is a power of two; 0 for what is not a number."""
    return (step / negative).log2().round().nan_to_num(0).clamp(0, SHIFTS - 1).long()


def powers(m: Tensor) -> Tensor:
    """2**m, exactly."""
    return (1 << m.long()).float()


def magnitudes(x: Tensor, step: Tensor, negative: Tensor, half: int, last: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of positive steps and, with their sign, of negative ones; one of both is zero."""
    return scaled(x, step, None).clamp_(0, half - 1).round_(), scaled(x, negative, None).clamp_(-last, 0).round_()


class FakeTwinGelu(torch.autograd.Function):
    """Quantize and dequantize; keeps only ``x`` for backward and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, negative: Tensor, half: int, last: int) -> Tensor:
        """Values, in the dtype of ``x``."""
        ctx.save_for_backward(x, step, negative)
        ctx.half, ctx.last = half, last
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, target, above, below in pieces((x, out), (step, negative)):
            high, low = magnitudes(part, above, below, half, last)
            torch.add(high.mul_(above), low.mul_(below), out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``step`` (equations at the top of the file)."""
        x, step, negative = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=grads[0].dtype, device=x.device)
        d_step = torch.empty(x.shape, dtype=wide(x), device=x.device)
        for part, grad, d, slope, above, below in pieces((x, grads[0], d_x, d_step), (step, negative)):
            torch.mul(grad, (part >= below * -ctx.last) & (part <= above * (ctx.half - 1)), out=d)
            torch.mul(scaled(part, above, None).clamp_(0, ctx.half - 1).round_(), grad, out=slope)
        return d_x, d_step.sum_to_size(step.shape), None, None, None
