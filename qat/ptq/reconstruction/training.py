"""The training of one unit. Shapes: B images of a batch, n all images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from qat.ptq.reconstruction.adam import Adam, Draws, Group
from qat.ptq.reconstruction.curriculum import Curriculum, Ranking
from qat.ptq.reconstruction.learned_steps import LearnedSteps
from qat.ptq.reconstruction.learned_weights import LearnedWeight, WeightRule
from qat.ptq.reconstruction.losses import UnitLoss
from qat.ptq.reconstruction.stand_in import Dropped
from qat.ptq.reconstruction.unit_data import UnitData
from qat.quantizers import operands_kept


@dataclass
class Schedule:
    """How long a unit is trained.

    Args:
        iterations: of all.
        checks: how many states are compared, beside the first one.
        curriculum: which images come first; None for no order.
        save_every: iterations between two states that are saved, where a store asks for them.
    """

    iterations: int
    checks: int
    curriculum: Curriculum | None
    save_every: int


@dataclass
class Learned:
    """What is learned about a unit.

    Args:
        weights: those that are learned, by site.
        steps: what is learned about activations.
        groups: the groups of ``steps``.
        dropped: activations, by site, whose values pass at random.
        drops: draws which ones.
    """

    weights: Mapping[str, LearnedWeight]
    steps: LearnedSteps
    groups: list[Group]
    dropped: Mapping[str, Dropped]
    drops: torch.Generator


class Training:
    """One unit, with what is learned about it in the place of its sites.

    Args:
        data: of the unit.
        inputs: what the unit reads for some images (B,), as it is trained.
        loss: compares its output.
        learned: what is learned.
        batch: B.
        held: share of the images that only choose between states.
        autocast: compute products in bfloat16.

    Attributes:
        title: what the progress says before the loss.
    """

    title = ""

    def __init__(
        self, data: UnitData, inputs: Callable[[Tensor], Tensor], loss: UnitLoss, learned: Learned, batch: int,
        held: float, autocast: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.inputs, self.loss, self.batch, self.autocast = data, inputs, loss, batch, autocast
        self.weights, self.steps, self.groups = list(learned.weights.values()), learned.steps, learned.groups
        self.drops, self.modules = learned.drops, [*self.weights, *learned.dropped.values()]
        count = len(data) - int(held * len(data))
        self.images, self.held = torch.arange(len(data)).tensor_split([count])
        if not len(self.held):
            self.held = self.images

    def iterate(self, adam: Adam, picks: Tensor, progress: float) -> None:
        """One step on the loss of some images, at a share 0 to 1 of all iterations."""
        with self.evaluating():
            self.loss.refresh(progress)
        value = found = self.compared(self.data.placed(picks))
        for weight in self.weights:
            if (term := weight.regularizer(progress)) is not None:
                value = value + term
        value.backward()
        self.steps.take_gradients()
        adam.step(progress)
        self.steps.write()
        for parameter in (*self.learned(), *self.steps.leaves):
            parameter.grad = None
        self.data.here.advance(lambda: f"{self.title}loss {float(found.detach()):.3f}")

    def run(self, rule: WeightRule, schedule: Schedule, generator: torch.Generator, key: str) -> None:
        """Train, and go back to the best state.

        Args:
            rule: how weights are learned.
            schedule: for how long.
            generator: draws batches.
            key: names this training among those of the calibration.
        """
        weights = Group([p for weight in self.weights for p in weight.learned()], rule.lr, rule.schedule == "cosine")
        adam, draws, T = Adam([weights, *self.groups]), Draws(self.batch, generator), schedule.iterations
        order = schedule.curriculum
        ranking = None if order is None else Ranking(order, T, self.images, self.losses)
        every, store, first = ceil(T / schedule.checks), self.data.here.work.method.store, 0
        if store is not None and "t" in (state := store.state(key) or {}):
            first, best, kept = self._go_on(state, adam, draws, ranking)
        else:
            self._first_value()
            best, kept = self.error(), self.state()
        version = self.loss.version()
        with self.learning():
            for t in range(first, T):
                self.iterate(adam, draws.next(ranking.at(t) if ranking else self.images), t / T)
                if (t + 1) % every == 0 or t + 1 == T:
                    error = self.error()
                    if self.loss.version() != version:
                        best, version = self._error_of(kept), self.loss.version()
                    if error < best:
                        best, kept = error, self.state()
                if store is not None and ((t + 1) % schedule.save_every == 0 or t + 1 == T):
                    if self.loss.version() != version:
                        best, version = self._error_of(kept), self.loss.version()
                    state = self._under_way(t + 1, best, kept, adam, draws, ranking)
                    store.save_state(key, {"prepared": rule.prepared(), **state})
        self.restore(kept)

    def _error_of(self, values: list[Tensor]) -> float:
        """The error of the held images with other values of what is learned."""
        now = self.state()
        self.restore(values)
        found = self.error()
        self.restore(now)
        return found

    @torch.no_grad()
    def _first_value(self) -> None:
        """Compute the loss that all others are divided by."""
        with self.evaluating():
            self.loss.refresh(0)
        self.compared(self.images[: self.batch])

    def _under_way(
        self, t: int, best: float, kept: list[Tensor], adam: Adam, draws: Draws, ranking: Ranking | None
    ) -> dict[str, Any]:
        """All that the next iterations depend on."""
        return {
            "t": t, "best": best, "kept": kept, "now": self.state(), "adam": adam.inner.state_dict(),
            "waiting": draws.waiting, "generators": [g.get_state() for g in (draws.generator, self.drops)],
            "order": None if ranking is None else ranking.order, "loss": self.loss.state(),
        }  # fmt: skip

    def _go_on(
        self, state: dict[str, Any], adam: Adam, draws: Draws, ranking: Ranking | None
    ) -> tuple[int, float, list[Tensor]]:
        """Go back to where an earlier process was; the iteration, the least error, and the values that gave it."""
        device = self.data.inputs.device  # that of the rows that are picked
        self.restore([value.to(device) for value in state["now"]])
        adam.inner.load_state_dict(state["adam"])
        draws.waiting = state["waiting"]
        for generator, own in zip((draws.generator, self.drops), state["generators"], strict=True):
            generator.set_state(own)
        if ranking is not None:
            ranking.order = state["order"]
        self.loss.load(state["loss"])
        return state["t"], state["best"], [value.to(device) for value in state["kept"]]

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Gradients for what is learned, and for nothing else in the model."""
        for parameter in self.data.here.model.parameters():
            parameter.requires_grad_(False)
        for parameter in (*self.learned(), *self.steps.leaves):
            parameter.requires_grad_(True)
        with torch.enable_grad(), operands_kept():
            yield
        for parameter in self.steps.leaves:
            parameter.requires_grad_(False)

    def compared(self, picks: Tensor) -> Tensor:
        """The loss of some images, as they are trained."""
        return self._loss_of(self.inputs(picks), picks)

    def _loss_of(self, x: Tensor, picks: Tensor) -> Tensor:
        """The loss of images of which the unit reads x (B, ...)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.loss(self.data.here.unit.run(x).float(), picks)

    @torch.no_grad()
    def losses(self, picks: Tensor, together: int = 1) -> Tensor:
        """The present loss of images, ``together`` at a time, with the unit as it will be."""
        with self.evaluating():
            parts = self.data.placed(picks).split(together)
            return torch.stack([self._loss_of(self.data.inputs[part], part) * len(part) for part in parts])

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
