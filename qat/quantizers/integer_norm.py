"""The output of a LayerNorm that computes with integers: FQ-ViT (Lin et al. 2022, arXiv 2111.13824), section 3.2.

Its input is a step s1 times integers I (`PTF`); with S = sum I, Q = sum I**2 and V = C Q - S**2, s1 cancels::

    y = gamma / s_o * (C I - S) / sqrt(V) + beta / s_o,   code = clip(round(y) + zero, 0, qmax)

``integer``: nothing but integers. M are the 8 leading bits of a factor, M / 2**N, where N = 31 - j::

    G = round(gamma / s_o * 2**20),  B = round(beta / s_o * 2**31)   per channel, before any image comes
    R = isqrt(V << 16)                                               per token
    M << j = 8 leading bits of (G << 19) / R                         per token and channel
    round(y) = ((M (C I - S) << j) + B + 2**30) >> 31

C is not in the factor, as it is below, because C I - S has it: so the sum has a power of two as its denominator, and
one output of a hundred differs by 1 from the released one.

``released``, the authors' code, in floating point: A = C gamma / (s_o sqrt(V)), N = 7 - floor(log2 |A|), M =
floor(A * 2**N), round(y) = round((M I + round((beta - gamma S / sqrt(V)) / s_o * 2**N)) / 2**N).

Both leave out the eps of LayerNorm; a token without variance gets beta. Shapes: (..., C) with C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers.blocks import row_blocks
from qat.quantizers.integers import divide, isqrt, leading_bits
from qat.quantizers.kernels import Bound, Kernels, host_reads, wide
from qat.quantizers.layout import Layout
from qat.quantizers.terms import Term
from qat.quantizers.uniform import Uniform, UniformQuantizer

Arithmetic = Literal["integer", "released"]
MANTISSA = 8  # bits of M
GAIN, ROOT, POINT = 20, 8, 31  # bits after the binary point of G, R and the sum
LARGEST = 2**14 - 1  # of gamma / s_o and beta / s_o: what is beyond leaves the grid anyway
MAX_SQUARES = 2**46  # of C Q >= V
# Widths in bits, for C = 2048 and 8-bit codes shifted by up to 3: I 12, S 23, Q 33, V 44, V << 16 60, R 30, C I - S 23,
# G << 19 53. |C I - S| <= sqrt(C V), so M (C I - S) << j is below 2**14 * 2**5.5 * 2**31, 51 bits; B has 45. N is not
# clipped from below, where nothing overflows; it ends at 31, where M has fewer bits, but moves y by 1/4 at most.


@dataclass(frozen=True)
class IntegerNorm(Uniform):
    """A `Uniform` grid, one step for the tensor, whose codes are computed from the integers that the norm reads.

    Args:
        arithmetic: ``integer``: all of it. ``released``: mean, deviation and factors in floating point, as the authors'
            code has them.
    """

    arithmetic: Arithmetic = "integer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("arithmetic", Arithmetic)
        if self.signed or self.granularity != "tensor":
            raise QatError("IntegerNorm has unsigned codes and one step: leave signed and granularity out")
        if self.zero == "fractional":
            raise QatError("zero: fractional is no integer: give IntegerNorm integer, code, clipped or none")

    def build(self, layout: Layout) -> IntegerNormQuantizer:
        """The module."""
        return IntegerNormQuantizer(self, layout)


class IntegerNormQuantizer(UniformQuantizer):
    """The module of `IntegerNorm`: parameter ``step`` (1,), s_o, and buffer ``zero_point`` (1,).

    The gradient is that of `Uniform` applied to the output of the float norm.
    """

    spec: IntegerNorm
    reads_integers = True

    def forward(
        self, y: Tensor, integers: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Values on the grid, in the dtype of ``y``.

        Args:
            y: output of the float LayerNorm (..., C), which calibration and gradients see.
            integers: its input in units of a common step (..., C), whole numbers held in floating point.
            weight: gamma (C,); 1 when missing.
            bias: beta (C,); 0 when missing.
        """
        if not self.enabled:
            return y
        if integers is None:
            raise QatError(
                "IntegerNorm computes with integers: give a spec to the site that the norm reads, or another here"
            )
        out = self._values(y, integers, weight, bias)
        gain = self.gain(y) if torch.is_grad_enabled() and self.step.requires_grad else 1.0
        result: Tensor = Replaced.apply(y, self.step, out, gain, self.bounds(y), self.arithmetic(y))
        return result

    @torch.no_grad()
    def encode(
        self, y: Tensor, integers: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Integer codes of what the integers give; without them, of the float output ``y``. Arguments as `forward`."""
        if integers is None:
            return super().encode(y)
        codes = torch.empty(y.shape, dtype=self.code_dtype, device=y.device)
        for rounded, target in self._rounded(y, integers, weight, bias, codes):
            target.copy_(rounded.clamp_(*self.bounds(y)).add_(self.zero_point))
        return codes

    @torch.no_grad()
    def _values(self, y: Tensor, integers: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``decode(encode(...))`` in the dtype of ``y``, without the codes in between."""
        out = torch.empty(y.shape, dtype=wide(y), device=y.device)
        for rounded, target in self._rounded(y, integers, weight, bias, out):
            target.copy_(rounded).clamp_(*self.bounds(y)).add_(0.0).mul_(self.step)  # -0.0 becomes 0.0, as in decode
        return out.to(y.dtype)

    def _rounded(
        self, y: Tensor, integers: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows: round(y), float64, and the same rows of ``out``."""
        step = self.step.double()
        gamma = (torch.ones_like(step) if weight is None else weight.double()) / step
        beta = (torch.zeros_like(step) if bias is None else bias.double()) / step
        exact = self.spec.arithmetic == "integer"
        norm, constants = (integer_norm, fixed_point(gamma, beta)) if exact else (released_norm, (gamma, beta))
        for part, target in row_blocks(integers, out):
            yield norm(part.double(), *constants), target

    def affine(self) -> None:
        """None: a code depends on its whole row."""
        return

    def terms(self, codes: Tensor) -> list[Term]:
        """A grid, all the same."""
        return [Term(codes.long() - self.zero_point.long(), self.step.detach())]


class Replaced(torch.autograd.Function):
    """Given values in the place of ``y``, with the gradients of `FakeQuantize`. It keeps ``y``, not the values."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, step: Tensor, values: Tensor, gain: float, bounds: tuple[Bound, Bound], kernels: Kernels
    ) -> Tensor:
        """``values``."""
        ctx.save_for_backward(y, step)
        ctx.gain, ctx.bounds, ctx.kernels = gain, bounds, kernels
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``y`` and ``step``."""
        y, step = ctx.saved_tensors
        d_y, d_step, _ = ctx.kernels.gradients(y, step, None, grads[0], *ctx.bounds)
        return d_y, d_step * ctx.gain, None, None, None, None


def moments(integers: Tensor) -> tuple[Tensor, Tensor]:
    """S and V (..., 1) of whole numbers I (..., C), float64.

    Raises:
        QatError: they could outgrow the widths above, on a CPU. Elsewhere, where the host does not wait for the result,
            S and V are NaN in such a row.
    """
    C = integers.shape[-1]
    S = integers.sum(-1, keepdim=True)
    squares = C * (integers * integers).sum(-1, keepdim=True)
    wide = squares > MAX_SQUARES
    if not host_reads(integers.device):
        S = S.masked_fill_(wide, torch.nan)
    elif wide.any():
        raise QatError(
            f"the integers of a LayerNorm over {C} channels reach {integers.abs().max():.0f}: quantize its input to "
            "fewer bits, or to a range that contains zero"
        )
    return S, squares - S * S


def fixed_point(gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """G << 19 and (B + 2**30) / 2**31 (C,), float64, from gamma / s_o and beta / s_o (C,), float64."""
    G = (gamma.clamp(-LARGEST, LARGEST) * 2.0**GAIN).round_()
    B = (beta.clamp(-LARGEST, LARGEST) * 2.0**POINT).round_()
    return G * 2.0 ** (POINT + ROOT - GAIN), (B + 2.0 ** (POINT - 1)) * 2.0**-POINT


def integer_norm(integers: Tensor, G: Tensor, B: Tensor) -> Tensor:
    """y (..., C) in units of s_o from I (..., C), float64, and what `fixed_point` gives.

    What is summed is scaled by 2**-31, which is exact in floating point: the shift at the end is then only a floor.
    """
    C = integers.shape[-1]
    S, V = moments(integers)
    R = isqrt(V.long() << 2 * ROOT).clamp_(min=1)  # without variance C I - S is zero, and any factor will do
    factor = leading_bits(divide(G, R.double()), MANTISSA)
    return (integers * (C * 2.0**-POINT)).sub_(S * 2.0**-POINT).mul_(factor).add_(B).floor_()


def released_norm(integers: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The same in the floating-point arithmetic of the authors' code; float64."""
    S, V = moments(integers)
    inverse = torch.where(V > 0, 1 / V.sqrt(), 0)
    A = integers.shape[-1] * gamma * inverse
    unit = leading_bits(A.abs(), 1).mul_(2.0 ** (1 - MANTISSA)).clamp_(2.0**-POINT, 1)  # 2**-N, N = 0 to 31
    M = (A / unit).trunc_().clamp_(1 - 2**MANTISSA, 2**MANTISSA - 1)  # with the sign of A
    B = (beta - S * inverse * gamma).div_(unit).round_()
    return (M * integers).add_(B).mul_(unit).round_()
