"""What every quantizer offers. Shapes: G groups that share a step, n values in a group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.recipe import Layout, Spec

MIN_STEP = 1e-6  # keeps v finite; far below any step that is worth having


class FloatSite(nn.Identity):
    """A site that no rule quantises: the tensor passes through."""


class Quantizer(nn.Module, ABC):
    """Maps a tensor to integer codes and back to values; ``forward`` is ``decode(encode(x))``, bit for bit.

    Parameters are allocated as NaN, so a forgotten calibration shows at once, and are filled by `init_from`, or by
    `set_range_` and `refine_` where a method of calibration searches for a range.

    Args:
        spec: bits, range and options.
        layout: how the tensor is cut into the G groups that share a step.
    """

    ranged: ClassVar[bool] = False  # the parameters follow from a range: `set_range_`

    def __init__(self, spec: Spec, layout: Layout) -> None:
        super().__init__()
        self.spec = spec
        self.layout = layout
        self.enabled = True
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

    def set_range_(self, low: Tensor, high: Tensor) -> None:
        """Choose the parameters so that the codes cover low..high (G,); only where `ranged`."""
        raise NotImplementedError(f"{type(self.spec).__name__} has no range")

    def refine_(self, samples: Tensor) -> None:
        """Choose, from samples (G, n), what a range leaves open; most quantizers leave nothing."""

    def target(self, x: Tensor, *others: Any) -> Tensor:
        """What ``forward`` approximates; its error is measured against it."""
        return x

    @torch.no_grad()
    def project_(self) -> None:
        """Move the parameters back to legal values after an optimiser step: keep the step positive."""
        self.step.clamp_(min=MIN_STEP)

    def compile_(self) -> None:
        """Use compiled arithmetic from now on; a quantizer that has none stays as it is."""

    @property
    def code_dtype(self) -> torch.dtype:
        """The integer type of codes: int8 or uint8 up to 8 bits, int32 beyond."""
        if self.spec.levels <= 2**8:
            return torch.int8 if self.spec.signed else torch.uint8
        return torch.int32

    @property
    def calibrated(self) -> bool:
        """Every parameter and buffer is finite."""
        return all(bool(torch.isfinite(values).all()) for values in (*self.parameters(), *self.buffers()))

    def view(self, values: Tensor, x: Tensor) -> Tensor:
        """One value per group (G,) shaped so that it broadcasts over ``x``."""
        axis, groups = self.layout.axis, self.layout.groups
        if groups == 1:
            return values
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        return values.repeat_interleave(x.shape[axis] // groups).view(shape)

    def grouped(self, x: Tensor) -> Tensor:
        """The values of each group as a row (G, n)."""
        if self.layout.groups == 1:
            return x.reshape(1, -1)
        return x.movedim(self.layout.axis, 0).reshape(self.layout.groups, -1)

    def extra_repr(self) -> str:
        """Spec and groups, for ``print(model)``."""
        return f"{self.spec}, groups={self.layout.groups}"
