"""Log-Int-Softmax: a softmax of integers whose output is a power of two: FQ-ViT (Lin et al. 2022, arXiv 2111.13824).

Logits become integers x <= 0 of a step s, the largest of a row subtracted. exp is the polynomial of I-BERT (Kim et al.
2021, arXiv 2101.01321), with constants b, c, x0 that depend on s alone, and the probability is the power of two next to
E / sum E, found in v = sum E / E by its leading one and the bit below it: v = 1 is k = 0, 2 is 1, 3 to 5 are 2, 6 to 11
are 3, 12 to 23 are 4::

    b = floor(2.7073 / s),  c = floor(2.7921 / s**2),  x0 = floor(-0.6931 / s),   x = max(x, n x0)
    q = floor(x / x0),      r = x - q x0,              E = (r (r + b) + c) << (n - q)
    v = floor(sum E / E + 1/2),                        k = rounded_log2(v),   value = 2**-k

n is 30, or less where the sum could reach 2**53: below, float64 is as exact as int64 (see `qat.quantizers.integers`).
What n cuts off is a probability of 2**-n, 2**-20 in practice, below any code of 4 bits. Shapes: (..., N) with N keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import QatError
from qat.quantizers import kernels
from qat.quantizers.blocks import row_blocks
from qat.quantizers.integer_exp import MAX_SHIFT, Exp
from qat.quantizers.integers import rounded_log2, rounded_power_
from qat.quantizers.layout import Layout
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.space import Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term, shifted
from qat.quantizers.uniform import Uniform

SoftmaxZero = Literal["last", "extra", "none"]
MAX_CODE_BITS = 8  # no v below 2**53 needs more than 6
FINEST = 2.0**-10  # of the steps of exp: finer ones change no power of two, and take bits from n
LONGEST = MAX_SHIFT * ceil(0.6931 / FINEST) + 1  # distances that have an E of their own, at the finest step
EXACT_FLOAT32 = 23  # below 2**23 and a little above, float32 holds every integer


@dataclass(frozen=True)
class LogIntSoftmax(Spec):
    """In the place of a softmax: code k stands for ``2**-k``.

    Args:
        logit_bits: width of the integers that logits become: unsigned, one step and zero point.
        zero: which code stands for a probability of zero. ``last``: the last of ``2**bits``. ``extra``: one more than
            ``2**bits``, as released FQ-ViT has it (4 bits have 17 levels). ``none``: there is none, and all that is
            too small has the smallest power (paper).
        extra_bits: bits by which logits are shifted left before exp, at most, until their step is 2**-10. x0 is a whole
            number of steps, so coarse ones inflate small probabilities: e**-5 by 5 % where the step is 0.1 and by
            89 % where it is 0.2. 0 is released FQ-ViT.
    """

    signed: bool = False
    logit_bits: int = 8
    zero: SoftmaxZero = "last"
    extra_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("zero", SoftmaxZero)
        if self.signed or self.granularity != "tensor":
            raise QatError("LogIntSoftmax has unsigned codes and one step: leave signed and granularity out")
        for field, value, low in (("logit_bits", self.logit_bits, 2), ("extra_bits", self.extra_bits, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= 8:
                raise QatError(f"{field} is {value!r}: give {low} to 8")
        if isinstance(self.bits, int) and self.bits > MAX_CODE_BITS:
            raise QatError(f"bits is {self.bits}: give LogIntSoftmax at most {MAX_CODE_BITS}")

    @property
    def levels(self) -> int:
        """``2**bits``, and one more for an extra zero."""
        return int(2**self.width) + (self.zero == "extra")

    @property
    def search_grid(self) -> Spec:
        """The uniform grid of the logits."""
        return Uniform(self.logit_bits)

    def build(self, layout: Layout) -> LogIntSoftmaxQuantizer:
        """The module."""
        return LogIntSoftmaxQuantizer(self, layout)


class LogIntSoftmaxQuantizer(Quantizer):
    """The module of `LogIntSoftmax`: parameter ``step`` (1,) and buffer ``zero_point`` (1,), both of the logits.

    The gradient is that of the softmax of the logits as they came. Calibration sets the step and training leaves it:
    its gradient is zero.
    """

    spec: LogIntSoftmax
    zero_point: Tensor
    ranged = True
    replaces_softmax = True
    smallest_step = FINEST

    def __init__(self, spec: LogIntSoftmax, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.register_buffer("zero_point", torch.full((layout.groups,), torch.nan))

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Powers of two, in the dtype of ``logits``; the float softmax when switched off.

        Args:
            logits: (..., N).
            mask: floating point, added to the logits, broadcast over them: 0 where a key is seen and -100 or -inf
                where it is not. It is rounded to integers of the step (FQ-ViT adds it to the quantized logits as it
                is, the same but for that rounding).
        """
        if not self.enabled:
            return _softmax(logits, mask)
        out: Tensor = AsSoftmax.apply(logits, mask, self.step, self)
        return out

    @torch.no_grad()
    def encode(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Exponents k, or the code of zero, the smallest integer type."""
        codes = torch.empty(logits.shape, dtype=self.code_dtype, device=logits.device)
        for v, _, target in self._inverses(logits, mask, codes):
            target.copy_(rounded_log2(v).clamp_(max=self.spec.qmax))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32."""
        values = torch.full((self.spec.levels,), 0.5, device=codes.device)
        values[:1] = 1
        values = values.cumprod(0)
        if self.spec.zero != "none":
            values[-1:] = 0
        return _pick(values, codes.int())

    def terms(self, codes: Tensor) -> list[Term]:
        """Powers of two."""
        codes, last = codes.long(), self.spec.qmax - (self.spec.zero != "none")
        found, factor = shifted(torch.ones_like(codes).where(codes <= last, 0), codes, last)
        return [Term(found, self.step.new_tensor(factor))]

    @torch.no_grad()
    def quantized(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """``decode(encode(logits, mask))``, float32, without the codes in between; NaN in a row that has a NaN."""
        out, last = torch.empty(logits.shape, device=logits.device), self.spec.qmax
        for v, valid, target in self._inverses(logits, mask, out):
            torch.div(valid, rounded_power_(v.float() if last < EXACT_FLOAT32 else v), out=target)
            if self.spec.zero == "none":
                target.clamp_(min=2.0**-last)
            else:  # zero from halfway to the power that the last code would stand for
                F.threshold(target, 2.0 ** (0.5 - last), 0, inplace=True)
        return out

    def _inverses(self, logits: Tensor, mask: Tensor | None, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Three tensors for each block of rows: v (float64), a mark for each row, and the same rows of ``out``.

        The mark is 1, or NaN where the row or the step has a NaN. The table of exponentials has a length that the host
        knows, so that it need not wait for an accelerator.
        """
        codes = 2**self.spec.logit_bits
        exps, farthest = self.exponentials(logits.shape[-1], codes if mask is None else LONGEST)
        x = self._integers(logits, mask, farthest + codes)
        for part, target in row_blocks(x, out):
            top = part.amax(-1, keepdim=True)
            yield inverses((top - part).int(), exps), 1 + 0 * top * self.step, target

    def _integers(self, logits: Tensor, mask: Tensor | None, reach: Tensor) -> Tensor:
        """Logits and mask in steps, float32; a mask of ``reach`` brings any logit to the farthest distance."""
        zero, codes = kernels.number(self.zero_point), 2**self.spec.logit_bits
        x = kernels.scaled(logits, self.step, None).clamp_(-zero, codes - 1 - zero).round_()
        if mask is not None:
            x = x + (mask.float() / self.step).clamp(-reach, reach).round_()
        return x

    def exponentials(self, keys: int, length: int) -> tuple[Tensor, Tensor]:
        """E (length,), float64, of every distance among so many keys, and the distance (1,) from which on E stays.

        Raises:
            QatError: there is no step yet. Only on a CPU: elsewhere the host does not wait, and the output is NaN.
        """
        if kernels.host_reads(self.step.device) and not torch.isfinite(self.step).all():
            raise QatError("LogIntSoftmax has no step yet: calibrate first, or load a checkpoint")
        step = self.step.detach().double()
        below = (step / FINEST).nextafter(torch.zeros_like(step))  # of a power of two: its own exponent is one higher
        shift = torch.frexp(below).exponent.clamp(0, self.spec.extra_bits)
        scale = torch.ones_like(shift) << shift
        exp = Exp.of(step / scale, keys)
        farthest = (exp.n * -exp.x0 / scale).ceil()
        return exp(-torch.arange(length, device=step.device) << shift).double(), farthest.float()

    def target(self, x: Tensor, *others: Any) -> Tensor:
        """The softmax of the logits, with the mask if there is one."""
        return _softmax(x, *others)

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The full range of the logits (1, n)."""
        self.set_range_(samples.amin(1), samples.amax(1))

    @torch.no_grad()
    def from_range(self, low: Tensor, high: Tensor) -> Table:
        """Step and zero point of logits in the range, which need not contain zero: a softmax sees differences."""
        step = ((high - low) / (2**self.spec.logit_bits - 1)).clamp(min=FINEST)
        return {"step": step, "zero_point": (-low / step).round()}


def inverses(distances: Tensor, exps: Tensor) -> Tensor:
    """v (..., N) of every key from distances (..., N), int32, and E of every distance, both float64.

    v is exact next to each n + 1/2 at which a power of two ends, so that its power is that of integer arithmetic:
    sum / E below n + 1/2 is at least 1 / 2E below it, and because the sum is below 2**53 it is not rounded up to it.
    """
    E = _pick(exps, distances.clamp_(0, len(exps) - 1))
    return torch.div(E.sum(-1, keepdim=True), E, out=E).add_(0.5).floor_()


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, which takes five times as long."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return (logits if mask is None else logits + mask).softmax(-1)


class AsSoftmax(torch.autograd.Function):
    """Quantized probabilities with the gradient of the float softmax, which backward computes again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, mask: Tensor | None, step: Tensor, quantizer: LogIntSoftmaxQuantizer
    ) -> Tensor:
        """Values, in the dtype of ``logits``."""
        ctx.save_for_backward(logits, mask, step)
        return quantizer.quantized(logits, mask).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """p (g - sum p g) for the logits, zero for the step."""
        logits, mask, step = ctx.saved_tensors
        probs = _softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), mask)
        d = probs * grads[0]
        d_logits = d - probs * d.sum(-1, keepdim=True)
        return d_logits.to(logits.dtype), None, torch.zeros_like(step), None
