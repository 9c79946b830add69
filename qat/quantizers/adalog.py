"""Logarithm to a base that is searched: AdaLog (Wu et al., ECCV 2024, arXiv 2407.12951).

    n = round(-log2(clip(x / step, 0, 1)) * 37 / q),   value = step * 2**-floor(n q / 37) * T[n q mod 37], 0 for large n
    T[j] = round(2**(-j / 37) * M) / M,   M = 2**(bits + 1) - 2,   q a whole number from 10 to 137

The base of the logarithm is 2**(q / 37). A value is an integer from a table of 37 entries, and a shift. Codes come from
comparing x / step, a float32, with exact thresholds (`qat.quantizers.adalog_tables`). The straight-through gradients,
with upstream gradient g:

    dx    = g                     where the value is not 0 and x <= step, so that nothing was clipped
    dstep = sum g * value / step, the derivative for fixed codes

Shapes: G groups that share a step and a base, n values in a group, K candidates, k kept ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers.adalog_tables import LEAST, MOST, PARTS, Tables, cells, denominator, mantissas, picked, tables
from qat.quantizers.candidates import TableSpace, least_error, thinned
from qat.quantizers.kernels import wide
from qat.quantizers.layout import Layout
from qat.quantizers.pieces import pieces
from qat.quantizers.quantizer import MIN_STEP, Quantizer
from qat.quantizers.recompute import keeps_operands
from qat.quantizers.space import Space, Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term, constant, shifted

Zero = Literal["last", "extra"]
MAX_ADALOG_BITS = 8
SHIFT = 0.169971  # minus the least value of GELU, to six digits as released


@dataclass(frozen=True)
class AdaLog(Spec):
    """Code n stands for ``2**(-n q / 37)`` of the step, rounded; one code stands for zero.

    Args:
        zero: which code stands for zero. ``last``: the last of ``2**bits``. ``extra``: one more than ``2**bits``, as
            released (4 bits have 17 levels).
        shifted: for the output of GELU: quantize x + 0.169971, and subtract it from the values. The product that reads
            them may leave out the subtraction and have it in its bias: `folded_bias`.
        unit: for probabilities: the step stays 1, as released. Otherwise a search looks for the step too, because the
            probabilities of most layers lie far below 1, and what is rounded to zero is missing from their sum.
    """

    signed: bool = False
    zero: Zero = "last"
    shifted: bool = False
    unit: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("zero", Zero)
        if self.signed:
            raise QatError("signed is True: codes of AdaLog are unsigned, leave signed out")
        if isinstance(self.bits, int) and self.bits > MAX_ADALOG_BITS:
            raise QatError(f"bits is {self.bits}: give AdaLog at most {MAX_ADALOG_BITS}, or choose Uniform")

    @property
    def powers(self) -> int:
        """How many codes stand for a power; the code that follows them stands for zero."""
        return int(2**self.width) - (self.zero == "last")

    @property
    def levels(self) -> int:
        """``2**bits``, and one more for an extra zero."""
        return self.powers + 1

    @property
    def holds_negatives(self) -> bool:
        """The values begin at minus the shift."""
        return self.shifted

    def tables(self, device: torch.device) -> Tables:
        """The codes and values of cells of floats, for every base."""
        return tables(self.width, self.powers, device)

    def build(self, layout: Layout) -> AdaLogQuantizer:
        """The module."""
        return AdaLogQuantizer(self, layout)


class AdaLogQuantizer(Quantizer):
    """The module of `AdaLog`: parameter ``step`` (G,), the value of code 0, and buffer ``base`` (G,), the numbers q."""

    spec: AdaLog
    base: Tensor

    def __init__(self, spec: AdaLog, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.register_buffer("base", torch.full((layout.groups,), torch.nan))

    @property
    def shift(self) -> float:
        """What is added before the logarithm and subtracted from the values; 0 where the spec is not shifted."""
        return SHIFT if self.spec.shifted else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 and return its own dtype."""
        if not self.enabled:
            return x
        out: Tensor = FakeAdaLog.apply(x, self.view(self.step, x), self._rows(x), self.spec, self.shift)
        return out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type; what is not above minus the shift is zero."""
        found, table = torch.empty(x.shape, dtype=self.code_dtype, device=x.device), self.spec.tables(x.device)
        for part, target, step, rows in pieces((x, found), (self.view(self.step, x), self._rows(x))):
            target.copy_(picked(table.codes, cells(part, step, rows, table.reach, self.shift)))
        return found

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        powers = self.spec.tables(codes.device).powers
        found = picked(powers, self._rows(codes) * powers.shape[1] + codes.int()) * self.view(self.step, codes)
        return found - self.shift if self.spec.shifted else found

    def integers(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Mantissas and shifts, both int64: a code stands for step * mantissa * 2**-shift / M, less the shift of GELU.

        Args:
            codes: in the shape of the tensor they came from.
        """
        parts = codes.long() * (self._rows(codes) + LEAST)
        mantissa, power = mantissas(self.spec.width).long().to(codes.device)[parts % PARTS], codes < self.spec.powers
        return mantissa.where(power, 0), (parts // PARTS).where(power, 0)

    def terms(self, codes: Tensor) -> list[Term]:
        """Shifted mantissas, and the shift of GELU."""
        deepest = int((self.spec.powers - 1) * self.base.max()) // PARTS
        found, factor = shifted(*self.integers(codes), deepest)
        steps = Term(found, self.view(self.step.detach(), codes) * (factor / denominator(self.spec.width)))
        return [steps, constant(self.step.new_tensor(-self.shift), codes)] if self.spec.shifted else [steps]

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The whole range of the samples (G, n), 1 for probabilities, and the base with the least squared error."""
        top = samples.amax(1) + self.shift
        self.step.copy_(top.clamp(min=MIN_STEP) if self.spec.shifted else torch.where(top > 1, top, 1))
        self.set_(least_error(self, self.every_base(), samples))

    def every_base(self) -> Table:
        """All of them (K, G), with the present step."""
        bases = torch.arange(LEAST, MOST + 1, device=self.step.device).to(self.step.dtype)
        base = bases[:, None].repeat(1, len(self.step))
        return {"base": base, "step": self.step.detach().expand_as(base)}

    @torch.no_grad()
    def search_space(self, samples: Tensor) -> Space | None:
        """Bases and steps; every base, with the present step, where that is 1 for good."""
        if self.spec.unit:
            if not bool(self.step.isfinite().all()):
                return None  # `init_from` gives the step
            return TableSpace(self.every_base())
        return StepsAndBases(steps_above(samples, self.shift) if self.spec.shifted else steps_below(samples))

    def _rows(self, x: Tensor) -> Tensor:
        """The row of a base in the tables, int32, shaped so that it broadcasts over ``x``."""
        rows = self.base.nan_to_num(LEAST).round().clamp(LEAST, MOST) - LEAST  # NaN: the step gives NaN, too
        return self.view(rows.int(), x)


def steps_above(samples: Tensor, shift: float) -> Tensor:
    """8 steps for the output of GELU (8, G), from the quantile .9 of the positive values to the largest.

    Args:
        samples: of the tensor (G, n).
        shift: what is added to them.
    """
    top = samples.amax(1)
    few, _ = thinned(samples).sort(1, descending=True)
    tenth = ((few > 0).sum(1, keepdim=True) // 10).clamp(max=few.shape[1] - 1)
    low = few.gather(1, tenth)[:, 0].clamp(min=0)
    return torch.stack([low.lerp(top, i / 7) + shift for i in range(8)]).clamp(min=MIN_STEP)


def steps_below(samples: Tensor) -> Tensor:
    """8 steps for probabilities (8, G), in geometric order from a tenth of the largest of the samples (G, n) to it."""
    ratios = torch.logspace(-1, 0, 8, device=samples.device)[:, None]
    return (samples.amax(1) * ratios).clamp(min=MIN_STEP)


class StepsAndBases(Space):
    """16 bases in geometric order, each with 8 steps (8, G)."""

    def __init__(self, steps: Tensor) -> None:
        bases = torch.logspace(0, 1, 16, MOST / LEAST, device=steps.device).mul(LEAST).round()
        base, step = bases[:, None, None].expand(-1, *steps.shape), steps.expand(16, -1, -1)
        ratio = torch.full_like(base, (MOST / LEAST) ** (1 / 15) - 1)
        gap = steps.diff(dim=0, prepend=2 * steps[:1] - steps[1:2]).expand_as(step)  # to the next smaller step
        first = {"base": base, "step": step, "base_gap": base * ratio, "step_gap": gap}
        super().__init__({name: values.flatten(0, 1) for name, values in first.items()})

    def near(self, kept: Table) -> Table:
        """The eight neighbours at a third of the distance; two bases differ by 1 at least."""
        around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]  # SPAWNED of them
        gaps = {"base_gap": kept["base_gap"] / 3, "step_gap": kept["step_gap"] / 3}
        base = [(kept["base"] + i * gaps["base_gap"].round().clamp(min=1)).clamp(LEAST, MOST) for i, _ in around]
        step = [(kept["step"] + j * gaps["step_gap"]).clamp(min=MIN_STEP) for _, j in around]
        same = {name: values.repeat(len(around), 1) for name, values in gaps.items()}
        return {"base": torch.cat(base), "step": torch.cat(step), **same}

    def parameters(self, points: Table) -> Table:
        """Bases and steps, without what tells the distance of their neighbours."""
        return {name: points[name] for name in ("base", "step")}


def folded_bias(bias: Tensor, weight: Tensor, shift: float) -> Tensor:
    """The bias (O,) of a product with weight (O, I) whose operand had ``shift`` not subtracted."""
    return bias - shift * weight.sum(1)


class FakeAdaLog(torch.autograd.Function):
    """Quantize and dequantize.

    Keeps only ``x`` for backward and computes the rest again, unless operands are kept: then the powers are, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, rows: Tensor, spec: AdaLog, shift: float) -> Tensor:
        """Values, in the dtype of ``x``."""
        ctx.spec, ctx.shift = spec, shift
        out, table = torch.empty(x.shape, dtype=x.dtype, device=x.device), spec.tables(x.device)
        powers = torch.empty(x.shape, device=x.device) if keeps_operands() else None
        ctx.save_for_backward(x, step, rows, powers)
        for part, target, kept, scale, row in pieces((x, out, out if powers is None else powers), (step, rows)):
            found = picked(table.values, cells(part, scale, row, table.reach, shift))
            if powers is not None:
                kept.copy_(found)
            if spec.shifted:
                torch.sub(found.mul_(scale), shift, out=target)
            else:
                torch.mul(found, scale, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``step`` (equations at the top of the file)."""
        x, step, rows, powers = ctx.saved_tensors
        table = ctx.spec.tables(x.device)
        d_x = torch.empty(x.shape, dtype=grads[0].dtype, device=x.device)
        d_step = torch.empty(x.shape, dtype=step.dtype, device=x.device)
        whole = (x, grads[0], d_x, d_step, d_step if powers is None else powers)
        for part, grad, d, slope, found, scale, row in pieces(whole, (step, rows)):
            if powers is None:
                found = picked(table.values, cells(part, scale, row, table.reach, ctx.shift))
            shifted_part = part.to(wide(part)) + ctx.shift if ctx.shift else part
            torch.le(shifted_part, scale, out=d)  # as a float: five times as fast as a bool
            d.mul_(torch.gt(found, 0, out=torch.empty_like(found))).mul_(grad)
            torch.mul(found, grad, out=slope)
        return d_x, d_step.sum_to_size(step.shape), None, None, None
