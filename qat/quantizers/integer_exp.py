"""exp in integers: the polynomial of I-BERT (Kim et al. 2021, arXiv 2101.01321) as FQ-ViT uses it.

For integers x <= 0 of a step s, with constants that depend on s alone::

    b = floor(2.7073 / s),  c = floor(2.7921 / s**2),  x0 = floor(-0.6931 / s),   x = max(x, n x0)
    q = floor(x / x0),      r = x - q x0,              E = (r (r + b) + c) << (n - q)

n is 30, or less where a sum of E could reach 2**53: below, float64 is as exact as int64 (`qat.quantizers.integers`).
What n cuts off is a probability of 2**-n, 2**-20 in practice, below any code of 4 bits. The constants are computed
where the step is, so that the host does not wait for an accelerator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantizers.integers import EXACT_BITS, divide

MAX_SHIFT = 30


class Exp(NamedTuple):
    """exp of integers times a step, as integers in units of about ``step**2 / 2.7921 / 2**n``: four int64 (1,)."""

    b: Tensor
    c: Tensor
    x0: Tensor
    n: Tensor

    @classmethod
    def of(cls, step: Tensor, keys: int) -> Exp:
        """The constants of a float64 step, with which the sum over so many keys, and half a term, stay below 2**53."""
        a = 0.35815147  # exp(r) is about a (r**2 + 2.7073 r + 2.7921) for -ln 2 < r <= 0
        b, c, x0 = (
            torch.full_like(step, value).div_(unit).floor_()  # number / step would multiply by a rounded 1 / step
            for value, unit in ((0.96963238 / a, step), (1 / a, step * step), (-0.6931, step))
        )
        c.clamp_(min=1)  # 0 for a step above 1.67, which leaves powers of two: r is always 0
        bits = torch.frexp((keys + 1) * c).exponent
        n = (EXACT_BITS - bits).clamp(max=MAX_SHIFT)  # no E exceeds c << n
        return cls(b.long(), c.long(), x0.long(), n.long())

    def __call__(self, x: Tensor) -> Tensor:
        """E > 0 for int64 x <= 0."""
        x = x.clamp(min=self.n * self.x0)
        q = divide(-x, -self.x0)
        r = x - q * self.x0
        return (r * (r + self.b) + self.c) << (self.n - q)
