"""Learned step size quantization: LSQ (Esser et al. 2020) and, with an offset, LSQ+ (Bhalgat et al. 2020).

    v = (x - offset) / step,   code = round(clip(v, qmin, qmax)),   value = step * code + offset

Rounding is half to even. The straight-through gradients, with upstream gradient g (ties v = qmin, qmax are inside):

    dx      = g                    inside,   0                outside
    dstep   = gain * sum g * d,    d = code - v inside,       qmin or qmax outside
    doffset = sum g                over the elements outside

Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers import fitting, kernels
from qat.quantizers.kernels import Bound, Kernels
from qat.quantizers.layout import Affine, Layout
from qat.quantizers.log_step import LogStep
from qat.quantizers.quantizer import MIN_STEP, Quantizer
from qat.quantizers.space import Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term, constant

GradScale = Literal["l1", "numel", "vvtq_act", "none"]
Init = Literal["mse", "lsq", "lsq_plus", "percentile"]
MIN_NORM = 1e-6  # of a group of weights: the gain of an all-zero one stays finite


@dataclass(frozen=True)
class LSQ(Spec):
    """Uniform quantizer whose step, and offset if it has one, are learned.

    Args:
        offset: learn an offset too (LSQ+), for a one-sided tensor such as the output of GELU.
        grad_scale: gain of the step's gradient. ``numel``: 1/sqrt(values per step * qmax), values counted per sample
            for activations (LSQ). ``l1``: 1/sqrt(L1 norm * qmax), weights only (VVTQ). ``vvtq_act``: 1/(sqrt(values,
            batch included) * qmax), the released VVTQ form for activations. ``none``: 1.
        init: ``mse``: least squared error. ``lsq``: 2 mean|x|/sqrt(qmax). ``lsq_plus``: 3 sigma for weights, ``mse``
            for activations. ``percentile``: the given share of the values is inside the range.
        percentile: for ``init: percentile``, in percent.
        log_step: learn the logarithm of the step, at a rate that is relative to its size.
    """

    offset: bool = False
    grad_scale: GradScale = "numel"
    init: Init = "mse"
    percentile: float = 99.9
    log_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("grad_scale", GradScale)
        self.check_choice("init", Init)
        if not 50 < self.percentile <= 100:
            raise QatError(f"percentile is {self.percentile}: give more than 50 and at most 100")

    @property
    def movable(self) -> bool:
        """Only an offset lets a range lie anywhere."""
        return self.offset

    def describe_range(self) -> str:
        """The codes, and whether an offset is learned."""
        return super().describe_range() + (" +offset" if self.offset else "")

    def build(self, layout: Layout) -> LSQQuantizer:
        """The module; QatError when ``grad_scale: l1`` is asked of an activation."""
        if self.grad_scale == "l1" and layout.batched:
            raise QatError("grad_scale l1 is defined for weights; choose numel, vvtq_act or none for an activation")
        return (LogLSQQuantizer if self.log_step else LSQQuantizer)(self, layout)


class LSQQuantizer(Quantizer):
    """The module of `LSQ`: parameters ``step`` (G,) and, when the spec asks for it, ``offset`` (G,)."""

    spec: LSQ
    ranged = True
    compilable = True
    even_grid = True

    def __init__(self, spec: LSQ, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.qmin, self.qmax = spec.qmin, spec.qmax
        self.offset = nn.Parameter(torch.full((layout.groups,), torch.nan)) if spec.offset else None

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        step = self.view(self.step, x)
        offset = None if self.offset is None else self.view(self.offset, x)
        gain = self.gain(x) if torch.is_grad_enabled() and self.step.requires_grad else 1.0
        out: Tensor = FakeQuantize.apply(x, step, offset, gain, (self.qmin, self.qmax), self.arithmetic(x))
        return out

    @torch.no_grad()
    def scaled(self, x: Tensor) -> Tensor:
        """v = (x - offset) / step, not yet clipped: a new tensor without gradient, at least float32."""
        step, offset = self.view(self.step, x), None if self.offset is None else self.view(self.offset, x)
        return kernels.scaled(x, step, offset)

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type."""
        return self.scaled(x).clamp_(self.qmin, self.qmax).round_().to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        values = codes.to(self.step.dtype) * self.view(self.step, codes)
        return values if self.offset is None else values + self.view(self.offset, codes)

    def affine(self) -> Affine | None:
        """The step and a zero point of zero; None with an offset, which is no whole number of steps."""
        if self.offset is not None:
            return None
        axis = None if self.layout.groups == 1 else self.layout.axis
        return Affine(self.step.detach(), torch.zeros_like(self.step), axis, self.qmin, self.qmax)

    def terms(self, codes: Tensor) -> list[Term]:
        """Codes times the step, and the offset."""
        steps = Term(codes.long(), self.view(self.step.detach(), codes))
        return [steps] if self.offset is None else [steps, constant(self.view(self.offset.detach(), codes), codes)]

    @property
    def whole_steps(self) -> bool:
        """One step, and no offset."""
        return self.offset is None and self.step.numel() == 1

    @torch.no_grad()
    def gain(self, x: Tensor) -> float | Tensor:
        """Gain of the step's gradient, shaped to broadcast over ``x``."""
        if not x.numel():
            return 1.0  # an empty batch has no gradient to scale
        match self.spec.grad_scale:
            case "numel":
                return super().gain(x)
            case "l1":
                norm = self.grouped(x.float()).abs().sum(1).clamp_(min=MIN_NORM)
                return self.view((norm * self.qmax).rsqrt(), x)
            case "vvtq_act":
                return 1 / (sqrt(x.numel() // self.layout.groups) * self.qmax)
            case _:
                return 1.0

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """Choose step and offset from samples (G, n) with the method that the spec names."""
        self.set_(self._table(*fitting.fit(samples.float(), self.spec, self.layout.batched)))

    @torch.no_grad()
    def from_range(self, low: Tensor, high: Tensor) -> Table:
        """The smallest step, and the offset if any, whose values span low..high as far as the sign allows."""
        return self._table(*fitting.from_range(low, high, self.spec))

    def _table(self, step: Tensor, offset: Tensor) -> Table:
        table = {"step": step.clamp(min=MIN_STEP)}
        return table if self.offset is None else table | {"offset": offset}


class LogLSQQuantizer(LogStep, LSQQuantizer):
    """An `LSQQuantizer` that learns the logarithm of its step."""


class FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; keeps only ``x`` for backward and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, gain: float | Tensor, bounds: tuple[Bound, Bound],
        kernels: Kernels,
    ) -> Tensor:  # fmt: skip
        """Values on the grid, in the dtype of ``x``."""
        ctx.save_for_backward(x, step, offset, gain if isinstance(gain, Tensor) else None)
        ctx.gain, ctx.bounds, ctx.kernels = gain, bounds, kernels
        return kernels.values(x, step, offset, *bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``step`` and ``offset`` (equations at the top of the file)."""
        x, step, offset, gain = ctx.saved_tensors
        d_x, d_step, d_offset = ctx.kernels.gradients(x, step, offset, grads[0], *ctx.bounds)
        return d_x, d_step * (ctx.gain if gain is None else gain), d_offset, None, None, None


assert set(fitting.METHODS) == set(get_args(Init))
