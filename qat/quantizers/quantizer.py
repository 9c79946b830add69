"""What every quantizer is: the module that a `Spec` builds, and what it states about itself.

Shapes: G groups that share a step, n values in a group, K candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.quantizers import kernels
from qat.quantizers.kernels import Kernels
from qat.quantizers.layout import Affine, Layout
from qat.quantizers.space import Space, Table
from qat.quantizers.spec import Spec
from qat.quantizers.terms import Term

MIN_STEP = 1e-6  # keeps x / step finite; far below any step that is worth having
MIN_RANGE = 1e-6  # what is narrower counts as a single point


class Quantizer(nn.Module, ABC):
    """Maps a tensor to integer codes and back to values; ``forward`` is ``decode(encode(x))``, bit for bit.

    Parameters are allocated as NaN, so a forgotten calibration shows at once, and are filled by `init_from`, or by
    `set_range_` and `refine_` where a method of calibration searches for a range. A subclass states what it can do, so
    that nothing else has to ask for its class.

    Attributes:
        ranged: the parameters follow from a range: `set_range_`, `from_range`.
        refines: a range, that of all values, leaves open what `refine_` chooses from samples; `from_range` is missing.
        deterministic: the same input gives the same output, so that backward may compute it again and nobody keeps it.
        replaces_softmax: it is given scores and a mask, and its values are probabilities.
        reads_integers: it needs the integers of what the LayerNorm before it reads.
        compilable: it has compiled arithmetic, which `compile_` chooses.
        even_grid: codes are ``round(clip(scaled(x), qmin, qmax))``: it has ``scaled``, ``qmin``, ``qmax``, ``offset``.
        smallest_step: the limit that `project_` keeps.
        holds_step: ``step`` is a parameter; otherwise it follows from others.

    Args:
        spec: bits, range and options.
        layout: how the tensor is cut into the G groups that share a step.
    """

    ranged: ClassVar[bool] = False
    refines: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True
    replaces_softmax: ClassVar[bool] = False
    reads_integers: ClassVar[bool] = False
    compilable: ClassVar[bool] = False
    even_grid: ClassVar[bool] = False
    smallest_step: ClassVar[float] = MIN_STEP
    holds_step: ClassVar[bool] = True

    def __init__(self, spec: Spec, layout: Layout) -> None:
        super().__init__()
        self.spec, self.layout = spec, layout
        self.enabled, self.compiled = True, False
        if self.holds_step:
            self.step = nn.Parameter(torch.full((layout.groups,), torch.nan))

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes, the shape of ``x``, ``code_dtype``."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of integer codes."""

    @abstractmethod
    def init_from(self, samples: Tensor) -> None:
        """Choose the parameters from samples (G, n) of the tensor, float32."""

    def from_range(self, low: Tensor, high: Tensor) -> Table:
        """Parameters whose codes cover low..high, both (G,) or (K, G), by name; where `ranged` and not `refines`."""
        raise NotImplementedError(f"the parameters of {type(self.spec).__name__} do not follow from a range alone")

    def set_range_(self, low: Tensor, high: Tensor) -> None:
        """Choose the parameters so that the codes cover low..high (G,); only where `ranged`."""
        self.set_(self.from_range(low, high))

    @torch.no_grad()
    def set_(self, row: Table) -> None:
        """Give parameters and buffers the values (G,) of a row of a table."""
        for name, values in row.items():
            getattr(self, name).copy_(values)

    def search_space(self, samples: Tensor) -> Space | None:
        """What a search tries, from samples (G, n), beyond ranges; None where ranges are all."""
        return None

    def refine_(self, samples: Tensor) -> None:
        """Choose, from samples (G, n), what a range leaves open; only where `refines`."""

    def tried(self, table: Table) -> Quantizer:
        """A quantizer of K * G groups along the first axis: candidate k of group g is group k * G + g of it."""
        candidates, groups = next(iter(table.values())).shape
        trial: Quantizer = self.spec.build(Layout(0, candidates * groups, batched=False)).to(self.step.device)
        trial.set_({name: values.flatten() for name, values in table.items()})
        return trial

    def affine(self) -> Affine | None:
        """Scale, zero point, axis and code range; None where codes are not an affine function of a single value."""
        return None

    def terms(self, codes: Tensor) -> list[Term]:
        """What codes stand for, as whole numbers and factors; by default an affine function.

        Raises:
            QatError: there is no such form, or the zero point is no whole number.
        """
        affine = self.affine()
        if affine is None:
            raise QatError(f"{type(self.spec).__name__} states no form in whole numbers (terms)")
        if not torch.equal(affine.zero_point, affine.zero_point.round()):
            raise QatError(f"a zero point of {type(self.spec).__name__} is {affine.zero_point[0]:g}, no whole number")
        return [Term(codes.long() - self.view(affine.zero_point, codes).long(), self.view(affine.scale, codes))]

    @property
    def whole_steps(self) -> bool:
        """All values are whole multiples of one ``step``, so that dividing by it gives the integers back."""
        return False

    def target(self, x: Tensor, *others: Any) -> Tensor:
        """What ``forward`` approximates; its error is measured against it."""
        return x

    @torch.no_grad()
    def project_(self) -> None:
        """Move the parameters back to legal values after an optimizer step."""
        self.step.clamp_(min=self.smallest_step)

    def illegal(self, site: str, values: Table) -> str:
        """What is wrong with values of the parameters at a site; empty where a quantizer can have them."""
        step = values["step"]
        return "" if bool((step > 0).all()) else f"a step of {site!r} is {step.min().item():g}, and steps are above 0"

    def compile_(self) -> bool:
        """Use compiled arithmetic from now on; False for a quantizer that has none and stays as it is."""
        self.compiled = self.compilable
        return self.compilable

    def arithmetic(self, x: Tensor) -> Kernels:
        """The arithmetic of the grid on the device of ``x``; QatError where it cannot be compiled and should be."""
        return kernels.compiled(x.device.type) if self.compiled else kernels.EAGER

    @property
    def top(self) -> int:
        """The code that scales the gradient of the step: the largest of a range that starts at zero."""
        return self.spec.qmax

    def gain(self, x: Tensor) -> float | Tensor:
        """Factor on the gradient of the step: 1 / sqrt(values per step and sample * top), as for `LSQ`."""
        values = x.numel() // self.step.numel()
        if self.layout.batched:
            values //= len(x) or 1
        return 1 / sqrt(values * self.top) if values else 1.0  # an empty batch has no gradient to scale

    @property
    def code_dtype(self) -> torch.dtype:
        """The integer type of codes: int8 or uint8 up to 8 bits, int32 beyond."""
        return (torch.int8 if self.spec.signed else torch.uint8) if self.spec.levels <= 2**8 else torch.int32

    @property
    def calibrated(self) -> bool:
        """Every parameter and buffer is finite; one without values, on the meta device, is not."""
        return not self.step.is_meta and all(bool(x.isfinite().all()) for x in (*self.parameters(), *self.buffers()))

    def view(self, values: Tensor, x: Tensor) -> Tensor:
        """One value per group (G,) shaped so that it broadcasts over ``x``."""
        return self.layout.view(values, x)

    def grouped(self, x: Tensor) -> Tensor:
        """The values of each group as a row (G, n)."""
        return self.layout.grouped(x)

    def extra_repr(self) -> str:
        """Spec and groups, for ``print(model)``."""
        return f"{self.spec}, groups={self.layout.groups}"
