"""The training of one unit. Shapes: B images of a batch, n all images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.ptq.reconstruction.adam import Adam, Draws, Group
from qat.ptq.reconstruction.curriculum import Curriculum, Ranking
from qat.ptq.reconstruction.learned_steps import LearnedSteps
from qat.ptq.reconstruction.learned_weights import LearnedWeight, WeightRule
from qat.ptq.reconstruction.losses import UnitLoss
from qat.ptq.reconstruction.stand_in import Dropped
from qat.ptq.reconstruction.unit_data import UnitData


@dataclass
class Schedule:
    """How long a unit is trained.

    Args:
        iterations: of all.
        checks: how many states are compared, beside the first one.
        curriculum: which images come first; None for no order.
    """

    iterations: int
    checks: int
    curriculum: Curriculum | None


class Training:
    """One unit, with what is learned about it in the place of its sites.

    Args:
        data: of the unit.
        inputs: what the unit reads for some images (B,), as it is trained.
        loss: compares its output.
        weights: what is learned about weights.
        steps: what is learned about activations.
        dropped: activations, by site, whose values pass at random.
        groups: the groups of ``steps``.
        batch: B.
        held: share of the images that only choose between states.
    """

    def __init__(
        self, data: UnitData, inputs: Callable[[Tensor], Tensor], loss: UnitLoss, weights: Mapping[str, LearnedWeight],
        steps: LearnedSteps, dropped: Mapping[str, Dropped], groups: list[Group], batch: int, held: float,
    ) -> None:  # fmt: skip
        self.data, self.inputs, self.loss, self.steps, self.groups, self.batch = (
            data,
            inputs,
            loss,
            steps,
            groups,
            batch,
        )
        self.weights = list(weights.values())
        self.modules: list[nn.Module] = [*self.weights, *dropped.values()]
        count = len(data) - int(held * len(data))
        self.images, self.held = torch.arange(len(data)).tensor_split([count])
        if not len(self.held):
            self.held = self.images

    def iterate(self, adam: Adam, picks: Tensor, progress: float) -> None:
        """One step on the loss of some images, at a share 0 to 1 of all iterations."""
        with self.evaluating():
            self.loss.refresh(progress)
        value = self.compared(picks)
        for weight in self.weights:
            if (term := weight.regularizer(progress)) is not None:
                value = value + term
        value.backward()
        self.steps.take_gradients()
        adam.step(progress)
        self.steps.write()
        for parameter in (*self.learned(), *self.steps.leaves):
            parameter.grad = None
        self.data.here.advance(1)

    def run(self, rule: WeightRule, schedule: Schedule, generator: torch.Generator) -> None:
        """Train, and go back to the best state."""
        weights = Group([p for weight in self.weights for p in weight.learned()], rule.lr, rule.schedule == "cosine")
        adam, draws, T = Adam([weights, *self.groups]), Draws(self.batch, generator), schedule.iterations
        ranking = schedule.curriculum and Ranking(schedule.curriculum, T, self.images, self.losses)
        every = max(1, T // schedule.checks)
        with torch.no_grad():
            with self.evaluating():
                self.loss.refresh(0)
            self.compared(self.images[: self.batch])  # the first value, which all others are divided by
        best, kept = self.error(), self.state()
        with self.learning():
            for t in range(T):
                self.iterate(adam, draws.next(ranking.at(t) if ranking else self.images), t / T)
                if (t + 1) % every == 0 or t + 1 == T:
                    error = self.error()
                    if error < best:
                        best, kept = error, self.state()
        self.restore(kept)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Gradients for what is learned, and for nothing else in the model."""
        for parameter in self.data.here.model.parameters():
            parameter.requires_grad_(False)
        for parameter in (*self.learned(), *self.steps.leaves):
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
        for parameter in self.steps.leaves:
            parameter.requires_grad_(False)

    def compared(self, picks: Tensor) -> Tensor:
        """The loss of some images, as they are trained."""
        return self.loss(self.data.here.unit.run(self.inputs(picks)), picks)

    @torch.no_grad()
    def losses(self, picks: Tensor, together: int = 1) -> Tensor:
        """The present loss of images, ``together`` at a time, with the unit as it will be."""
        run, inputs = self.data.here.unit.run, self.data.inputs
        with self.evaluating():
            return torch.stack([self.loss(run(inputs[part]), part) * len(part) for part in picks.split(together)])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The unit as it will be, inside the block."""
        for module in self.modules:
            module.eval()
        yield
        for module in self.modules:
            module.train()

    def error(self) -> float:
        """The mean loss of the held images."""
        return float(self.losses(self.held, self.batch).sum()) / len(self.held)

    def learned(self) -> list[nn.Parameter]:
        """All parameters that Adam moves."""
        return [*(p for weight in self.weights for p in weight.learned()), *self.steps.steps, *self.steps.ends]

    def state(self) -> list[Tensor]:
        """Their values."""
        return [parameter.detach().clone() for parameter in self.learned()]

    @torch.no_grad()
    def restore(self, kept: list[Tensor]) -> None:
        """Give them values."""
        for parameter, value in zip(self.learned(), kept, strict=True):
            parameter.copy_(value)
        self.steps.write()
