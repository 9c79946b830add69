"""Adam with a learning rate for every group and iteration, and draws of batches. Shapes: B images of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn


@dataclass
class Group:
    """Parameters with a learning rate of their own.

    Args:
        parameters: what is learned.
        lr: at the start.
        cosine: whether it falls to zero along half a cosine; otherwise it stays.
    """

    parameters: list[nn.Parameter]
    lr: float
    cosine: bool


class Adam:
    """Adam without weight decay, whose learning rates are set for every iteration."""

    def __init__(self, wanted: Sequence[Group], betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.groups = [group for group in wanted if group.parameters and group.lr]
        groups = [{"params": group.parameters, "lr": group.lr} for group in self.groups]
        self.inner = torch.optim.Adam(groups, betas=betas, fused=True)

    def step(self, progress: float) -> None:
        """Take a step at a share 0 to 1 of all iterations."""
        for group, found in zip(self.groups, self.inner.param_groups, strict=True):
            found["lr"] = group.lr * (1 + cos(pi * progress)) / 2 if group.cosine else group.lr
        self.inner.step()


class Draws:
    """Batches of indices, without replacement until all have had their turn.

    Args:
        batch: B.
        generator: on the CPU.
    """

    def __init__(self, batch: int, generator: torch.Generator) -> None:
        self.batch, self.generator = batch, generator
        self.waiting = torch.empty(0, dtype=torch.long)

    def next(self, among: Tensor) -> Tensor:
        """The next batch (B,) among some images; what is no longer among them has no turn."""
        allowed = self.waiting[torch.isin(self.waiting, among)]
        while len(allowed) < min(self.batch, len(among)):
            fresh = among[torch.randperm(len(among), generator=self.generator)]
            allowed = torch.cat([allowed, fresh])
        self.waiting = allowed[self.batch :]
        return allowed[: self.batch]
