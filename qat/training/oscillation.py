"""Oscillation of quantized weights (Nagel et al. 2022; specification of VVTQ, section 6.1).

With integer codes k, momentum m and the last non-zero direction d of each weight, 0 at the start:

    D = sign(k_before - k_now),   o = 1 if d * D = -1 else 0,   d <- D where D is not 0,   f <- m o + (1 - m) f

f is the frequency, 1 for a weight that flips at every update. Two changes in the same direction are no oscillation, and
the first change never counts. State per weight: code in the integer type of its quantizer, direction int8, frequency
float16, or float32 for a momentum so small that float16 would lose its increments.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_MOMENTUM = 0.005  # from here on, float16 is within a few percent of the exact frequency


class Oscillation:
    """The codes of one weight over time.

    Args:
        codes: integer codes at the start, any shape.
        momentum: m above, 0 to 1.
    """

    def __init__(self, codes: Tensor, momentum: float) -> None:
        self.momentum = momentum
        self.codes = codes
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        dtype = torch.float16 if momentum >= HALF_MOMENTUM else torch.float32
        self.frequency = torch.zeros_like(codes, dtype=dtype)
        self.total = torch.zeros((), dtype=torch.int64, device=codes.device)  # oscillations since the start

    def update(self, codes: Tensor) -> None:
        """Compare with the codes after a step, which have the type of those at the start."""
        change = (self.codes > codes).to(torch.int8).sub_((self.codes < codes).to(torch.int8))
        oscillates = (change * self.direction) == -1
        self.direction = torch.where(change == 0, self.direction, change)
        self.frequency.lerp_(oscillates.to(self.frequency.dtype), self.momentum)
        self.total += oscillates.sum()
        self.codes = codes

    def share(self, threshold: float) -> Tensor:
        """The share, 0 to 1, of the weights whose frequency is above ``threshold``: a scalar on the device."""
        return (self.frequency > threshold).float().mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the state, on the CPU."""
        return {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; a state of an older version may hold wider types."""
        for name, value in state.items():
            setattr(self, name, value.to(self.codes.device, getattr(self, name).dtype, copy=True))


class Freezable(Oscillation):
    """Also keeps the running mean of the codes, and a mask of the weights that are frozen at their code."""

    def __init__(self, codes: Tensor, momentum: float) -> None:
        super().__init__(codes, momentum)
        self.mean = codes.to(torch.float32)  # half precision would stand still a unit away from the code
        self.frozen = torch.zeros_like(codes, dtype=torch.bool)

    def update(self, codes: Tensor) -> None:
        """As for `Oscillation`; the codes of frozen weights stay."""
        super().update(torch.where(self.frozen, self.codes, codes))
        self.mean.lerp_(self.codes.to(torch.float32), self.momentum)

    def freeze(self, threshold: float) -> None:
        """Fix the weights whose frequency is above ``threshold`` at the code that they had on average."""
        new = (self.frequency > threshold).logical_and_(~self.frozen)
        self.codes = torch.where(new, self.mean.round().to(self.codes.dtype), self.codes)
        self.frozen |= new
