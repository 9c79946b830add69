"""What a calibration method is. Shapes: B images, S pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn


class PTQMethod(ABC):
    """Fills the parameters of every quantizer of a model; it changes values, never structure."""

    @abstractmethod
    def __call__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate ``model``, in evaluation mode, on normalised images (B, 3, S, S) on the model's device."""
