"""The training of one unit. Shapes: B images of a batch, n all images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn

from qat.ptq.reconstruction.learned_weights import LearnedWeight


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

    def __init__(self, groups: list[Group]) -> None:
        self.groups = [group for group in groups if group.parameters and group.lr]
        self.inner = torch.optim.Adam([{"params": group.parameters, "lr": group.lr} for group in self.groups])

    def step(self, progress: float) -> None:
        """Take a step at a share 0 to 1 of all iterations."""
        for group, found in zip(self.groups, self.inner.param_groups, strict=True):
            found["lr"] = group.lr * (1 + cos(pi * progress)) / 2 if group.cosine else group.lr
        self.inner.step()
        self.inner.zero_grad()


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


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode for some modules inside the block, training mode after it."""
    modules = list(modules)
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def regularizers(weights: list[LearnedWeight], progress: float) -> list[Tensor]:
    """What the weights add to the loss."""
    found = [weight.regularizer(progress) for weight in weights]
    return [value for value in found if value is not None]
