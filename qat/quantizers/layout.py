"""How a tensor is cut into groups that share a step, and codes that are affine in a group.

Shapes: G groups, n values in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Granularity = Literal["tensor", "channel", "head", "qkv"]


@dataclass(frozen=True)
class Layout:
    """How the tensor of one site is cut into groups that share a step.

    Args:
        axis: the axis that is cut; it may count from the end.
        groups: number of equal, contiguous pieces along ``axis``; 1 is per tensor.
        batched: the first axis is the batch (activations) and not a part of the tensor (weights).
    """

    axis: int
    groups: int
    batched: bool

    def view(self, values: Tensor, x: Tensor) -> Tensor:
        """One value per group (G,) shaped so that it broadcasts over ``x``."""
        if self.groups == 1:
            return values
        shape = [1] * x.ndim
        shape[self.axis] = x.shape[self.axis]
        return values[:, None].expand(-1, x.shape[self.axis] // self.groups).reshape(shape)  # a view for a single value

    def grouped(self, x: Tensor) -> Tensor:
        """The values of each group as a row (G, n)."""
        if self.groups == 1:
            return x.reshape(1, -1)
        return x.movedim(self.axis, 0).reshape(self.groups, -1)


class Affine(NamedTuple):
    """What codes stand for where they are an affine function of a value.

    A value x has the code ``clip(round(x / scale) + zero_point, qmin, qmax)``, which stands for
    ``(code - zero_point) * scale``. Scale and zero point have one value per group (G,): G equal, contiguous pieces
    along ``axis``. Where ``axis`` is None, one scale and one zero point (1,) hold for the whole tensor.
    """

    scale: Tensor
    zero_point: Tensor  # whole numbers, held in floating point
    axis: int | None
    qmin: int
    qmax: int
