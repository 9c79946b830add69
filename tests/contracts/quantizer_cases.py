"""Every quantizer at every sign, granularity and at three widths, for tests of what all of them promise.

Shapes: B images, H heads, N tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import qat.quantizers  # noqa: F401  registers the kinds
from qat.quantizers import Quantizer
from qat.quantizers.layout import Layout
from qat.quantizers.spec import Spec

# Options of each kind that are worth a run of their own. A kind that has only one sign fixes it: {"signed": False}.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "LSQ": [{}, {"offset": True}, {"offset": True, "log_step": True}],
    "DFQ": [{"signed": False, "zero": zero} for zero in (False, True)],
    "LogSqrt2": [{"signed": False, "zero": zero} for zero in ("last", "extra", "rounded")],
    "AdaLog": [
        {"signed": False, "zero": zero, "shifted": shifted} for zero in ("last", "extra") for shifted in (False, True)
    ],
    "BitLog2": [
        {"signed": False, "form": form, "extra": extra} for form in ("single", "half") for extra in (False, True)
    ],
    "PTF": [{"signed": False, "granularity": "channel", "zero": zero} for zero in ("code", "clipped")],
    "SULQ": [{"signed": False}],
    "TwinGelu": [{"signed": False, "ratio": ratio} for ratio in ("power", "free")],
    "TwinSoftmax": [{"signed": False, "overlap": overlap} for overlap in (False, True)],
    "Uniform": [
        {},
        {"zero": "code"},
        {"zero": "clipped"},
        {"zero": "fractional", "signed": False},
        {"zero": "none"},
        {"log_step": True},
    ],
}
ROWS = {"IntegerNorm", "LogIntSoftmax"}  # kinds whose codes depend on a whole row: each has tests of its own
WIDTHS = {"BitLog2": (2, 3, 4)}  # no more: its integers have up to 2**bits bits
OTHER_WIDTHS = (2, 4, 8)
SHAPES = {True: (4, 2, 3, 4), False: (6, 10)}  # activation (B, H, N, D), weight (O, I)
LAYOUTS = {
    "tensor": [Layout(0, 1, batched=True)],
    "channel": [Layout(-1, 4, batched=True), Layout(0, 6, batched=False)],
    "head": [Layout(1, 2, batched=True)],
    "qkv": [Layout(0, 3, batched=False)],
}


class Case(NamedTuple):
    kind: str
    options: tuple[tuple[str, Any], ...]
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.layout.batched]

    @property
    def spec(self) -> Spec:
        return Spec.kinds[self.kind](**dict(self.options))

    def build(self) -> Quantizer:
        return self.spec.build(self.layout)


def cases(kind: str, options: dict[str, Any]) -> list[Case]:
    """Every width, sign and granularity that an example leaves open."""
    found = {
        Case(kind, tuple(sorted(full.items())), layout)
        for bits in WIDTHS.get(kind, OTHER_WIDTHS)
        for signed in (True, False)
        for cut, layouts in LAYOUTS.items()
        if options.get("granularity", cut) == cut
        for full in [{"bits": bits, "signed": signed, "granularity": cut, **options}]
        for layout in layouts
    }
    return sorted(found, key=str)


def over_cases(check: Callable[[Case], None]) -> Callable[..., None]:
    """Decorator: a test for each example that runs ``check`` on each of its cases."""
    examples = [(kind, options) for kind, found in EXAMPLES.items() for options in found]

    def test(kind: str, options: dict[str, Any]) -> None:
        for case in cases(kind, options):
            try:
                check(case)
            except Exception as error:
                error.add_note(f"in {case}")
                raise

    test.__doc__ = check.__doc__
    return pytest.mark.parametrize(("kind", "options"), examples, ids=str)(test)


def samples(case: Case) -> Tensor:
    """Values with outliers; not negative where the codes are not, unless an offset brings them there."""
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    x = x * x.abs()
    return x if case.spec.signed else x.abs()


@cache
def _calibrated(case: Case) -> Quantizer:
    quantizer = case.build()
    quantizer.init_from(quantizer.grouped(samples(case)))
    return quantizer


def calibrated(case: Case) -> Quantizer:
    return copy.deepcopy(_calibrated(case))


def spread(case: Case, values: Tensor) -> Tensor:
    """A tensor in which every group has all of ``values``."""
    if not case.layout.batched:
        return values.expand(case.shape[0], -1)
    return values.view(-1, 1, 1, 1).expand(-1, *case.shape[1:])


def all_codes(case: Case, quantizer: Quantizer) -> Tensor:
    """Every code in every group."""
    codes = torch.arange(quantizer.spec.qmin, quantizer.spec.qmin + quantizer.spec.levels)
    return spread(case, codes.to(quantizer.code_dtype))
