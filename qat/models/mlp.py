"""Gated MLPs of timm: a gate times a value, each linear in the input. Shapes: B batch, N tokens, C channels, F hidden.

The layer that reads their product is a `QuantGatedLinear`: the product has both signs, unlike the output of GELU.
"""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.layers import QuantGatedLinear, QuantLinear
from qat.sites.insert import SiteBuilder, swapped, swaps


@swaps(GluMlp)
class QuantGluMlp(nn.Module):
    """Gate and value are halves of the output of ``fc1``."""

    def __init__(self, mlp: Any, site: SiteBuilder) -> None:
        super().__init__()
        if not isinstance(mlp.fc1, nn.Linear):
            raise QatError(f"{site.prefix}fc1 is a {type(mlp.fc1).__name__}: only Linear is reproduced")
        self.gate_last: bool = mlp.gate_last
        self.fc1, self.act, self.drop1 = QuantLinear(mlp.fc1, site.child("fc1")), mlp.act, mlp.drop1
        self.norm = swapped(mlp.norm, site.child("norm"))
        self.fc2, self.drop2 = QuantGatedLinear(mlp.fc2, site.child("fc2")), mlp.drop2

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        first, second = self.fc1(x).chunk(2, dim=-1)  # (B, N, F) each
        x = first * self.act(second) if self.gate_last else self.act(first) * second
        out: Tensor = self.drop2(self.fc2(self.norm(self.drop1(x))))
        return out


@swaps(SwiGLU)
class QuantSwiGLU(nn.Module):
    """Gate and value have layers of their own, ``fc1_g`` and ``fc1_x``."""

    def __init__(self, mlp: SwiGLU, site: SiteBuilder) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = (
            QuantLinear(mlp.fc1_g, site.child("fc1_g")),
            QuantLinear(mlp.fc1_x, site.child("fc1_x")),
        )
        self.act, self.drop1 = mlp.act, mlp.drop1
        self.norm = swapped(mlp.norm, site.child("norm"))
        self.fc2, self.drop2 = QuantGatedLinear(mlp.fc2, site.child("fc2")), mlp.drop2

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = self.act(self.fc1_g(x)) * self.fc1_x(x)  # (B, N, F)
        out: Tensor = self.drop2(self.fc2(self.norm(self.drop1(x))))
        return out
