"""Two uniform grids for the output of softmax: PTQ4ViT (Yuan et al., ECCV 2022, arXiv 2111.12293).

    coarse D2 = step, fine D1 = step / 2**m, q = 2**(bits - 1)
    value = clip(round(x / D1), 0, q - 1) * D1   where x < q * D1,   clip(round(x / D2), 0, q - 1) * D2   elsewhere

One bit of a code says which grid, the others are the magnitude. Two integer products, one for each grid, are aligned by
a shift of m bits. Where m > bits, the fine grid ends below half a coarse step, and what lies between the two is 0. The
released code adds both grids, which overlap (``overlap``, with step D2 and z = q - 1):

    value = round(clip(x / D2, z / 2**m, z)) * D2 + clip(round(x / D1), 0, z) * D1

Calibration gives the step 1 / q, or 1 / (q - 1) where the grids overlap, so only m is searched. The straight-through
gradients, with upstream gradient g:

    dx    = g                     for 0 <= x <= (q - 1) * step
    dstep = sum g * value / step, the derivative for fixed codes

Shapes: G groups that share a step and an exponent, n values in a group, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers.candidates import TableSpace, least_error
from qat.quantizers.kernels import scaled, wide
from qat.quantizers.layout import Layout
from qat.quantizers.pieces import pieces
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.space import Space, Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term

SPLITS = 20  # exponents m from 0 to 19


class Grid(NamedTuple):
    """Both grids side by side, for ratios x / step and factors 2**m that broadcast over them."""

    half: int

    def codes(self, ratio: Tensor, factor: Tensor) -> Tensor:
        """The range bit, 1 is coarse, and the magnitude."""
        coarse = (ratio * factor).ge_(self.half)
        return self._magnitudes(ratio, factor)[0].add_(coarse, alpha=self.half)

    def steps(self, ratio: Tensor, factor: Tensor) -> Tensor:
        """The values in units of the step."""
        magnitudes, own = self._magnitudes(ratio, factor)
        return magnitudes.div_(own)

    def _magnitudes(self, ratio: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The magnitudes, and the factor of the grid that each of them belongs to."""
        own = (ratio * factor).lt_(self.half).mul_(factor - 1).add_(1)  # of the fine grid, or 1
        return (ratio * own).clamp_(0, self.half - 1).round_(), own


class Overlapping(Grid):
    """The sum of both grids."""

    def codes(self, ratio: Tensor, factor: Tensor) -> Tensor:
        """The sum of both magnitudes."""
        high, low = self._parts(ratio, factor)
        return high.add_(low)

    def steps(self, ratio: Tensor, factor: Tensor) -> Tensor:
        """The values in units of the step."""
        high, low = self._parts(ratio, factor)
        return high.add_(low.div_(factor))

    def _parts(self, ratio: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        top = self.half - 1
        high = torch.maximum(ratio, top / factor).clamp_(max=top).round_()
        return high, (ratio * factor).clamp_(0, top).round_()


@dataclass(frozen=True)
class TwinSoftmax(Spec):
    """A fine grid next to zero and a coarse one, whose steps differ by a power of two.

    Args:
        overlap: the values of the released code, the sum of both grids: every value has an error of almost the range
            of the fine grid. It has one level less, and fewer where the coarse grid begins above zero.
    """

    signed: bool = False
    overlap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed:
            raise QatError("signed is True: codes of TwinSoftmax are unsigned, leave signed out")

    @property
    def half(self) -> int:
        """q: how many magnitudes a grid has."""
        return int(2 ** (self.width - 1))

    @property
    def levels(self) -> int:
        """``2**bits``, and one less where the ends of both grids are one code."""
        return 2 * self.half - self.overlap

    def build(self, layout: Layout) -> TwinSoftmaxQuantizer:
        """The module."""
        return (OverlapQuantizer if self.overlap else TwinSoftmaxQuantizer)(self, layout)


class TwinSoftmaxQuantizer(Quantizer):
    """The module of `TwinSoftmax`: parameter ``step`` (G,), the coarse one, and buffer ``exponent`` (G,), m."""

    spec: TwinSoftmax
    exponent: Tensor
    grid: ClassVar[type[Grid]] = Grid

    def __init__(self, spec: TwinSoftmax, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.register_buffer("exponent", torch.full((layout.groups,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        out: Tensor = FakeTwin.apply(x, self.view(self.step, x), self._factor(x), self.grid(self.spec.half))
        return out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type: a range bit, 1 is coarse, and magnitudes."""
        codes, grid = torch.empty(x.shape, dtype=self.code_dtype, device=x.device), self.grid(self.spec.half)
        for part, target, step, factor in pieces((x, codes), (self.view(self.step, x), self._factor(x))):
            target.copy_(grid.codes(scaled(part, step, None), factor))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        mantissas, shifts = self.integers(codes)
        return (mantissas << shifts).to(self.step.dtype) / self._factor(codes) * self.view(self.step, codes)

    def terms(self, codes: Tensor) -> list[Term]:
        """Multiples of the fine step."""
        mantissas, shifts = self.integers(codes)
        return [Term(mantissas << shifts, self.view(self.step.detach(), codes) / self._factor(codes))]

    def integers(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Mantissas and shifts, both int64: a code stands for mantissa * 2**shift fine steps, of step * 2**-m each.

        Args:
            codes: in the shape of the tensor they came from.
        """
        codes, half = codes.long(), self.spec.half
        return codes % half, torch.where(codes < half, 0, self._bits(codes))

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """A range of 1, and the exponent with the least squared error on the samples (G, n)."""
        self.step.fill_(1 / (self.spec.half - self.spec.overlap))
        self.set_(least_error(self, self._splits(), samples))

    @torch.no_grad()
    def search_space(self, samples: Tensor) -> Space:
        """Every exponent, with the present step."""
        return TableSpace(self._splits())

    def _splits(self) -> Table:
        exponents = torch.arange(SPLITS, device=self.step.device).to(self.step.dtype)[:, None]
        exponent = exponents.repeat(1, len(self.step))  # (K, G)
        return {"exponent": exponent, "step": self.step.detach().expand_as(exponent)}

    def _bits(self, x: Tensor) -> Tensor:
        """m, int64, shaped so that it broadcasts over ``x``."""
        return self.view(self.exponent.nan_to_num(0).round().clamp(0, SPLITS - 1).long(), x)  # NaN: so is the step

    def _factor(self, x: Tensor) -> Tensor:
        """2**m, exactly."""
        return (1 << self._bits(x)).to(self.step.dtype)


class OverlapQuantizer(TwinSoftmaxQuantizer):
    """The sum of both grids; a code is the sum of both magnitudes, so that it grows with the value."""

    grid: ClassVar[type[Grid]] = Overlapping

    def integers(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """As `TwinSoftmaxQuantizer.integers`; all shifts are 0, for a value has steps of both grids."""
        top = self.spec.half - 1
        first = (top / self._factor(codes)).round().long()  # the magnitude of the coarse grid where it begins
        codes = torch.maximum(codes.long(), first)  # no value has a smaller code
        low = (codes - first).clamp(max=top)
        return ((codes - low) << self._bits(codes)) + low, torch.zeros_like(codes)


class FakeTwin(torch.autograd.Function):
    """Quantize and dequantize; keeps only ``x`` for backward and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, factor: Tensor, grid: Grid) -> Tensor:
        """Values, in the dtype of ``x``."""
        ctx.save_for_backward(x, step, factor)
        ctx.grid = grid
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, target, one, own in pieces((x, out), (step, factor)):
            torch.mul(grid.steps(scaled(part, one, None), own), one, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``step`` (equations at the top of the file)."""
        x, step, factor = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=grads[0].dtype, device=x.device)
        d_step = torch.empty(x.shape, dtype=wide(x), device=x.device)
        for part, grad, d, slope, one, own in pieces((x, grads[0], d_x, d_step), (step, factor)):
            torch.mul(grad, (part >= 0) & (part <= one * (ctx.grid.half - 1)), out=d)
            torch.mul(ctx.grid.steps(scaled(part, one, None), own), grad, out=slope)
        return d_x, d_step.sum_to_size(step.shape), None, None
