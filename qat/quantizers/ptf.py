"""Power-of-two factors for the input of LayerNorm: FQ-ViT (Lin et al. 2022, arXiv 2111.13824), section 3.2.

    s_c = s1 * 2**shift_c,   code = clip(round(x / s_c) + zero, 0, 2**bits - 1),   value = (code - zero) * s_c

Base step s1 and zero point are shared by all channels, so (code - zero) << shift_c is an integer in units of s1, of
which LayerNorm needs no more than sums. Rounding is half to even and comes before the zero point is added; the authors
add first, which differs on exact ties. The step learns like that of `LSQ`; zero point and shifts are chosen by
calibration and stay. Shapes: C channels, n values in a channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.quantizers import kernels
from qat.quantizers.layout import Affine, Granularity, Layout
from qat.quantizers.lsq import FakeQuantize
from qat.quantizers.quantizer import MIN_RANGE, MIN_STEP, Quantizer
from qat.quantizers.spec import Spec

PTFZeroPoint = Literal["code", "clipped"]
MAX_FACTORS = 7


@dataclass(frozen=True)
class PTF(Spec):
    """Unsigned codes on the grid of a channel, whose step is a power of two times a common one.

    Args:
        factors: the largest shift, K of the paper.
        zero: the zero point is one of the codes. ``code``: the range is widened until it contains zero. ``clipped``:
            it is not (released FQ-ViT: a range without zero loses its far end).
    """

    signed: bool = False
    granularity: Granularity = "channel"
    factors: int = 3
    zero: PTFZeroPoint = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("zero", PTFZeroPoint)
        if self.signed:
            raise QatError("signed is True: codes of PTF are unsigned, leave signed out")
        if self.granularity != "channel":
            raise QatError(f"granularity is {self.granularity!r}: PTF has a shift per channel, leave granularity out")
        if not isinstance(self.factors, int) or isinstance(self.factors, bool) or not 0 <= self.factors <= MAX_FACTORS:
            raise QatError(f"factors is {self.factors!r}: give 0 to {MAX_FACTORS}")

    @property
    def holds_negatives(self) -> bool:
        return True  # below the zero point

    def build(self, layout: Layout) -> PTFQuantizer:
        """The module."""
        return PTFQuantizer(self, layout)


class PTFQuantizer(Quantizer):
    """The module of `PTF`: parameter ``step`` (1,), which is s1, buffers ``zero_point`` (1,) and ``shift`` (C,)."""

    spec: PTF
    zero_point: Tensor
    shift: Tensor
    ranged = True
    compilable = True
    refines = True

    def __init__(self, spec: PTF, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.step = nn.Parameter(torch.full((1,), torch.nan))
        self.register_buffer("zero_point", torch.full((1,), torch.nan))
        self.register_buffer("shift", torch.full((layout.groups,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        learns = torch.is_grad_enabled() and self.step.requires_grad
        gain = self.gain(x) if learns else 1.0
        step = self.view(self.channel_step, x)
        bounds = [kernels.number(bound) for bound in self.bounds]
        out: Tensor = FakeQuantize.apply(x, step, None, gain, bounds, self.arithmetic(x))
        return out

    @property
    def channel_step(self) -> Tensor:
        """s_c, (C,): exact, because a power of two changes no mantissa."""
        return self.step * self.shift.exp2()

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of code - zero, (1,)."""
        return -self.zero_point, self.spec.qmax - self.zero_point

    @torch.no_grad()
    def centred(self, x: Tensor) -> Tensor:
        """code - zero, float32."""
        return kernels.scaled(x, self.view(self.channel_step, x), None).clamp_(*self.bounds).round_()

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type."""
        return (self.centred(x) + self.zero_point).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        return (codes.to(self.step.dtype) - self.zero_point) * self.view(self.channel_step, codes)

    def integers(self, x: Tensor) -> Tensor:
        """The values as integers in units of ``step``, (code - zero) << shift, exact in float32."""
        return self.centred(x) * self.view(self.shift.exp2(), x)

    def affine(self) -> Affine | None:
        """A step for each channel, the same zero point for all."""
        zero = self.zero_point.expand_as(self.shift)
        return Affine(self.channel_step.detach(), zero, self.layout.axis, self.spec.qmin, self.spec.qmax)

    @property
    def whole_steps(self) -> bool:
        """The step of a channel is a power of two times the base step."""
        return True

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The full range of the samples (C, n), and the shifts that fit them best."""
        self.set_range_(samples.amin(1), samples.amax(1))
        self.refine_(samples)

    @torch.no_grad()
    def set_range_(self, low: Tensor, high: Tensor) -> None:
        """Step and zero point of the union of the ranges low..high (C,), and the smallest shift that holds each."""
        steps, coarsest = self.spec.qmax, 2**self.spec.factors
        bottom, top = low.amin(), high.amax()
        if self.spec.zero == "code" or top - bottom <= MIN_RANGE:
            bottom, top = bottom.clamp(max=0), top.clamp(min=0)
        self.step.copy_(((top - bottom) / steps / coarsest).clamp(min=MIN_STEP))
        self.zero_point.copy_((-bottom / (self.step * coarsest)).round().clamp(0, steps))
        self.shift.fill_(self.spec.factors)
        for shift in reversed(range(self.spec.factors)):
            step = self.step * 2**shift
            lower, upper = ((bound + half) * step for bound, half in zip(self.bounds, (-0.5, 0.5), strict=True))
            self.shift[(low >= lower) & (high <= upper)] = shift  # half a step beyond the end still rounds to it

    @torch.no_grad()
    def refine_(self, samples: Tensor) -> None:
        """Give every channel the shift of least squared error on samples (C, n); the smallest among equals."""
        errors = []
        for shift in range(self.spec.factors + 1):  # all at once would take K + 1 times the memory
            step = self.step * 2**shift
            values = kernels.values(samples, step, None, *self.bounds)
            errors.append(values.sub_(samples).square_().mean(1))
        self.shift.copy_(torch.stack(errors).argmin(0))
