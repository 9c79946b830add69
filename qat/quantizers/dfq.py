"""Dynamic focusing quantizer for the output of softmax: AIQViT (AAAI 2025, arXiv 2502.04628), equation 15.

A uniform grid on an interval from a to b, both of which are learned; L = 2**bits - 1:

    step = (b - a) / L,   code = round(clip((x - a) / step, 0, L)),   value = a + code * step

What lies below a becomes a, so that the many small probabilities keep their mass. The paper can also be read so that
they become 0 (``zero``), which leaves one code less for the interval:

    step = (b - a) / (L - 1),   value = 0 where x < a,   a + round(clip((x - a) / step, 0, L - 1)) * step elsewhere

The straight-through gradients, with r = round(u) - u at u = (x - a) / step, and L - 1 for L with ``zero``:

             d/dx   d/da           d/db
    x < a    0      1, or 0        0
    inside   1      -r / L         r / L
    x > b    0      0              1

Shapes: G groups that share an interval, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.quantizers.candidates import TableSpace, least_error, thinned
from qat.quantizers.layout import Layout
from qat.quantizers.lsq import FakeQuantize
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.space import Space, Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term

NARROWEST = 1e-3  # of an interval, which is one of probabilities
STARTS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # quantiles that are tried as a, beside 0
ENDS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)  # quantiles that are tried as b


@dataclass(frozen=True)
class DFQ(Spec):
    """Even steps on a learned interval.

    Args:
        zero: values below the interval become 0, which takes a code of its own; otherwise they become its start.
    """

    signed: bool = False
    zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed:
            raise QatError("signed is True: codes of DFQ are unsigned, leave signed out")

    @property
    def steps(self) -> int:
        """Steps from a to b."""
        return int(2**self.width) - 1 - self.zero

    def build(self, layout: Layout) -> DFQQuantizer:
        """The module."""
        return DFQQuantizer(self, layout)


class DFQQuantizer(Quantizer):
    """The module of `DFQ`: parameters ``low`` and ``high`` (G,), a and b."""

    spec: DFQ
    holds_step = False

    def __init__(self, spec: DFQ, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.low = nn.Parameter(torch.full((layout.groups,), torch.nan))
        self.high = nn.Parameter(torch.full((layout.groups,), torch.nan))

    @property
    def step(self) -> Tensor:  # type: ignore[override]
        """The step (G,), which follows from the interval."""
        return (self.high - self.low) / self.spec.steps

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` in float32 or better and return its own dtype."""
        if not self.enabled:
            return x
        step, low = self.view(self.step, x), self.view(self.low, x)
        out: Tensor = FakeQuantize.apply(x, step, low, 1.0, (0, self.spec.steps), self.arithmetic(x))
        return torch.where(below(x, low), torch.zeros_like(out), out) if self.spec.zero else out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, same shape, the smallest integer type; with ``zero``, 0 is what lies below a."""
        low = self.view(self.low, x)
        codes = (x.to(torch.promote_types(x.dtype, torch.float32)) - low) / self.view(self.step, x)
        codes = codes.clamp_(0, self.spec.steps).round_()
        return (torch.where(below(x, low), 0, codes + 1) if self.spec.zero else codes).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of codes in the shape of the tensor they came from."""
        steps = codes.to(self.low.dtype) - int(self.spec.zero)
        values = steps * self.view(self.step, codes) + self.view(self.low, codes)
        return torch.where(steps < 0, torch.zeros_like(values), values)

    def terms(self, codes: Tensor) -> list[Term]:
        """Steps from the start of the interval, which the code of zero is not in."""
        steps = codes.long() - int(self.spec.zero)
        step, low = self.view(self.step.detach(), codes), self.view(self.low.detach(), codes)
        return [Term(steps.clamp(min=0), step), Term((steps >= 0).long(), low)]

    @torch.no_grad()
    def init_from(self, samples: Tensor) -> None:
        """The interval with the least squared error on the samples (G, n)."""
        self.set_(least_error(self, intervals(samples), samples))

    @torch.no_grad()
    def search_space(self, samples: Tensor) -> Space:
        """Intervals between quantiles of the samples (G, n)."""
        return TableSpace(intervals(samples))

    @torch.no_grad()
    def project_(self) -> None:
        """Keep 0 <= a <= b - `NARROWEST` and b <= 1 after an optimizer step."""
        self.high.clamp_(NARROWEST, 1)
        self.low.copy_(torch.minimum(self.low.clamp(min=0), self.high - NARROWEST))

    def illegal(self, site: str, values: Table) -> str:
        """Whether an interval has no width."""
        wide = values["high"] > values["low"]
        return "" if bool(wide.all()) else f"an interval of {site!r} ends where it starts, or before"


def below(x: Tensor, low: Tensor) -> Tensor:
    """What becomes 0: values below the interval, and 0 where it starts there."""
    return (x < low) | (x <= 0)


def intervals(samples: Tensor) -> Table:
    """Starts and ends (K, G) that are tried, from samples (G, n) of probabilities."""
    x = thinned(samples).float().clamp(0, 1)
    starts = x.quantile(torch.tensor(STARTS, device=x.device), dim=1)
    starts = torch.cat([torch.zeros_like(starts[:1]), starts.clamp(max=1 - NARROWEST)])
    ends = x.quantile(torch.tensor(ENDS, device=x.device), dim=1)
    low = starts.repeat_interleave(len(ends), dim=0)
    return {"low": low, "high": torch.maximum(ends.repeat(len(starts), 1), low + NARROWEST)}
