"""Uniform quantization with an integer zero point (Jacob et al. 2018, arXiv 1712.05877).

    v = round(x / step),   code = clip(v + zero, qmin, qmax),   value = (code - zero) * step

Rounding is half to even, and comes before the zero point is added. The step learns like that of `LSQ`; the zero point
is chosen by calibration and stays. Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import kernels
from qat.quantizers.kernels import Bound
from qat.quantizers.layout import Affine, Layout
from qat.quantizers.log_step import LogStep
from qat.quantizers.lsq import FakeQuantize
from qat.quantizers.quantizer import MIN_RANGE, MIN_STEP, Quantizer
from qat.quantizers.space import Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term

NARROW = 2**-10  # of the larger end: a range that is narrower is almost a point
ZeroPoint = Literal["integer", "code", "clipped", "fractional", "none"]


@dataclass(frozen=True)
class Uniform(Spec):
    """Codes between two ends of a range.

    Args:
        zero: what the zero point may be. ``integer``: any integer, so a range need not contain zero. ``code``: one of
            the codes; the range is widened until it contains zero. ``clipped``: one of the codes, but the range stays
            (released FQ-ViT: a range without zero loses its far end). ``fractional``: any number, as released RepQ-ViT
            has it after reparameterization; both ends of the range then lie off the grid and add a level. ``none``:
            zero, for symmetric weights.
        log_step: learn the logarithm of the step, at a rate that is relative to its size.
    """

    signed: bool = False
    zero: ZeroPoint = "integer"
    log_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("zero", ZeroPoint)
        if self.zero == "fractional" and self.signed:
            raise QatError("zero: fractional is defined for unsigned codes: leave signed out")
        if self.zero == "fractional" and self.log_step:
            raise QatError("log_step is not there for zero: fractional: leave one of them out")

    @property
    def movable(self) -> bool:
        """Only a zero point lets a range lie anywhere."""
        return self.zero != "none"

    @property
    def search_grid(self) -> Spec:
        """The plain grid: that of a norm of integers is the same."""
        return Uniform(self.bits, self.signed, zero=self.zero)

    def per_channel(self) -> Uniform:
        """The same codes with a step for each channel; only the mean of their zero points may be a fraction."""
        return replace(self, granularity="channel", zero="integer" if self.zero == "fractional" else self.zero)

    @property
    def steps(self) -> int:
        """Steps between the two ends."""
        return int(2**self.width) - 1

    @property
    def levels(self) -> int:
        """``2**bits``, and one more where the ends lie off the grid."""
        return self.steps + (2 if self.zero == "fractional" else 1)

    def build(self, layout: Layout) -> UniformQuantizer:
        """The module."""
        if self.log_step:
            return LogUniformQuantizer(self, layout)
        return (FractionalQuantizer if self.zero == "fractional" else UniformQuantizer)(self, layout)

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point (G,) for values in low..high (G,); a range that is almost a point is widened to zero."""
        if self.zero == "none":
            reach = torch.maximum(low.abs(), high.abs()) * 2 if self.signed else high
            return (reach / self.steps).clamp(min=MIN_STEP), torch.zeros_like(low)
        point = torch.maximum(low.abs(), high.abs()) * NARROW  # a dead channel: its zero point would be astronomic
        widened = (high - low <= point.clamp(min=MIN_RANGE)) | (self.zero == "code")
        low, high = torch.where(widened, low.clamp(max=0), low), torch.where(widened, high.clamp(min=0), high)
        step = ((high - low) / self.steps).clamp(min=MIN_STEP)
        zero = self.qmin - low / step
        if self.zero != "fractional":
            zero = zero.round()
        return step, zero.clamp(self.qmin, self.qmin + self.steps) if self.zero in ("code", "clipped") else zero


class UniformQuantizer(Quantizer):
    """The module of `Uniform`: parameter ``step`` (G,) and buffer ``zero_point`` (G,)."""

    spec: Uniform
    zero_point: Tensor
    ranged = True
    compilable = True

    def __init__(self, spec: Uniform, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.register_buffer("zero_point", torch.full((layout.groups,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        learns = torch.is_grad_enabled() and self.step.requires_grad
        gain = self.gain(x) if learns else 1.0
        out: Tensor = FakeQuantize.apply(x, self.view(self.step, x), None, gain, self.bounds(x), self.arithmetic(x))
        return out

    def bounds(self, x: Tensor) -> tuple[Bound, Bound]:
        """The ends of code - zero, shaped to broadcast over ``x``."""
        zero = kernels.number(self.view(self.zero_point, x))
        return self.spec.qmin - zero, self.spec.qmin + self.spec.steps - zero

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type."""
        v = kernels.scaled(x.detach(), self.view(self.step.detach(), x), None).clamp_(*self.bounds(x)).round_()
        return (v + self.view(self.zero_point, x)).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        return (codes.to(self.step.dtype) - self.view(self.zero_point, codes)) * self.view(self.step, codes)

    @property
    def top(self) -> int:
        """The largest code, without the level that a fractional zero point adds."""
        return self.spec.qmax if self.spec.signed else self.spec.steps

    def affine(self) -> Affine | None:
        """Step and zero point."""
        axis = None if self.layout.groups == 1 else self.layout.axis
        return Affine(self.step.detach(), self.zero_point, axis, self.spec.qmin, self.spec.qmax)

    @property
    def whole_steps(self) -> bool:
        """One step, and a zero point that is a whole number."""
        return self.step.numel() == 1

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The full range of the samples (G, n)."""
        self.set_range_(samples.amin(1), samples.amax(1))

    @torch.no_grad()
    def from_range(self, low: Tensor, high: Tensor) -> Table:
        """Step and zero point of the range."""
        step, zero = self.spec.from_range(low, high)
        return {"step": step, "zero_point": zero}

    @torch.no_grad()
    def set_affine_(self, step: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Set one step and one zero point, the nearest whole number; both are returned in the precision given."""
        zero_point = self._legal(zero_point)
        row = {"step": step.to(self.zero_point), "zero_point": zero_point.to(self.zero_point)}
        self.set_({name: values.expand_as(self.zero_point) for name, values in row.items()})
        return step, zero_point

    def _legal(self, zero_point: Tensor) -> Tensor:
        return zero_point.round()


class LogUniformQuantizer(LogStep, UniformQuantizer):
    """A `UniformQuantizer` that learns the logarithm of its step."""


class FractionalQuantizer(UniformQuantizer):
    """The grid of a zero point that is no integer: code 0 and the last code stand for the two ends, off the grid."""

    compilable = False  # the compiled arithmetic clips before it rounds

    def forward(self, x: Tensor) -> Tensor:
        """As `UniformQuantizer.forward`, rounded before it is clipped."""
        if not self.enabled:
            return x
        gain, step = self.gain(x) if torch.is_grad_enabled() else 1.0, self.view(self.step, x)
        step = step.detach() + (step - step.detach()) * gain
        v = x.to(torch.promote_types(x.dtype, torch.float32)) / step
        v = v + (v.round() - v).detach() if torch.is_grad_enabled() else v.round_()
        return (v.clamp(*self.bounds(x)) * step).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes: 1 is the first value of the grid above the lower end."""
        v = kernels.scaled(x.detach(), self.view(self.step.detach(), x), None).round_()
        return (v - self._first(x) + 1).clamp_(0, self.spec.qmax).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32."""
        v = codes.to(self.step.dtype) - 1 + self._first(codes)
        return v.clamp(*self.bounds(codes)) * self.view(self.step, codes)

    def affine(self) -> None:
        """None: the zero point is not a whole number."""
        return

    def terms(self, codes: Tensor) -> list[Term]:
        """Whole steps, and both ends, which lie off the grid."""
        values = codes.long() - 1 + self._first(codes).long()
        step, (low, high) = self.view(self.step.detach(), codes), self.bounds(codes)
        below, above = values < low, values > high
        return [
            Term(values.masked_fill(below | above, 0), step),
            Term(below.long(), low * step),
            Term(above.long(), high * step),
        ]

    @property
    def whole_steps(self) -> bool:
        """False: the ends of the range lie off the grid."""
        return False

    def _legal(self, zero_point: Tensor) -> Tensor:
        return zero_point

    def _first(self, x: Tensor) -> Tensor:
        """The smallest integer above the lower end; an end on the grid is code 0."""
        return self.view((-self.zero_point).floor() + 1, x)
