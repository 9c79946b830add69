"""Reconstruction of one unit after the other: BRECQ (ICLR 2021), QDrop (ICLR 2022) and what builds on them.

A unit reads what the quantized units before it give and is trained until it gives what the unit of the float model
gives. Weights are learned by a `WeightRule`, steps of activations as they are or as logarithms; all else stays.
Shapes: B images of a batch, n all images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from qat.ptq.reconstruction.learned_steps import LogSteps, PlainSteps
from qat.ptq.reconstruction.learned_weights import AdaRound, LearnedWeight, WeightRule
from qat.ptq.reconstruction.loop import Adam, Draws, Group, evaluating, regularizers
from qat.ptq.reconstruction.losses import MSE, Logits, ReconstructionLoss, UnitLoss
from qat.ptq.reconstruction.stand_in import Dropped, mixed, standing_in
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work
from qat.quantizers import Quantizer
from qat.ranges import Range, Seed, check_fields

UnitInput = Literal["quantized", "float", "mixed"]


@dataclass
class Reconstruct(Step):
    """Train every unit, in the order of the network, to give the output of the float model.

    Args:
        weights: how weights are learned; null is AdaRound.
        loss: what the output of a unit is compared by; null is MSE.
        head_loss: what the output of the last unit, which are the logits, is compared by; null is Logits.
        iterations: for each unit.
        batch: images of an iteration.
        step_lr: learning rate of the steps of activations, which falls to zero along half a cosine; 0 leaves them.
        log_steps: learn steps as logarithms, so that the rate is relative to their size.
        input: what a unit reads: what the ``quantized`` units before it give, what the ``float`` ones give, or a value
            of either at random (``mixed``), with the probability ``keep`` for the quantized one.
        keep: probability with which a value of an activation is quantized while a unit is trained (QDrop: 0.5).
        held: share of the images that only choose between the states of a unit.
        checks: how many states are compared, beside the first one; the last of them is the end.
        seed: draws batches and what is not quantized.
    """

    weights: WeightRule | None = None
    loss: ReconstructionLoss | None = None
    head_loss: ReconstructionLoss | None = None
    iterations: Annotated[int, Range(1, 10_000_000)] = 1000
    batch: Annotated[int, Range(1, 100_000)] = 32
    step_lr: Annotated[float, Range(low=0, high=1)] = 4e-5
    log_steps: bool = False
    input: UnitInput = "quantized"
    keep: Annotated[float, Range(above=0, high=1)] = 1.0
    held: Annotated[float, Range(low=0, below=1)] = 0.125
    checks: Annotated[int, Range(1, 10_000)] = 4
    seed: Seed = 0

    stage = Stage.RECONSTRUCT
    changes_weights = True
    needs_float = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def ticks(self) -> int:  # type: ignore[override]
        """An iteration each."""
        return self.iterations

    def begin(self, work: Work) -> None:
        """Start the random numbers."""
        self._generator = torch.Generator().manual_seed(self.seed)
        self._drops = torch.Generator(next(work.model.parameters()).device).manual_seed(self.seed)

    def finish(self, here: UnitWork) -> None:
        """Train the unit."""
        rule = self.weights or AdaRound()
        sites = {site.name: site for site in here.wanted_weights() if site.name.endswith("weight_quant")}
        started = {name: rule.start(site.quantizer, site.weight, self._generator) for name, site in sites.items()}
        learned = {name: weight for name, weight in started.items() if weight is not None}
        activations = {
            name: quantizer for name, quantizer in here.wanted_activations().items()
            if not quantizer.replaces_softmax and not quantizer.reads_integers
        }  # fmt: skip
        moving = list(activations.values()) if self.step_lr else []
        if not learned and not moving:
            return
        data = UnitData(here)
        loss = self._loss(here).start(data)
        training = Training(self, data, loss, learned, activations, moving)
        with standing_in(here.model, {**learned, **training.dropped}):
            training.run(rule)
        with torch.no_grad():
            for name, weight in learned.items():
                sites[name].weight.copy_(weight.folded(sites[name].weight))

    def _loss(self, here: UnitWork) -> ReconstructionLoss:
        if here.is_last:
            return self.head_loss or Logits()
        return self.loss or MSE()


class Training:
    """The training of one unit.

    Args:
        options: of the step.
        data: of the unit.
        loss: compares its output.
        learned: its weights, by site.
        activations: its quantizers, by site.
        moving: those of them whose steps are learned.
    """

    def __init__(
        self, options: Reconstruct, data: UnitData, loss: UnitLoss, learned: dict[str, LearnedWeight],
        activations: dict[str, Quantizer], moving: list[Quantizer],
    ) -> None:  # fmt: skip
        self.options, self.data, self.loss, self.drops = options, data, loss, options._drops
        self.weights, self.moving = list(learned.values()), moving
        self.steps = (LogSteps if options.log_steps else PlainSteps)(moving)
        self.dropped: dict[str, nn.Module] = {}
        if options.keep < 1:
            self.dropped = {name: Dropped(q, options.keep, self.drops) for name, q in activations.items()}
        held = int(options.held * len(data))
        self.train, self.held = torch.arange(len(data)).tensor_split([len(data) - held])

    def run(self, rule: WeightRule) -> None:
        """Train, and go back to the best state."""
        options, draws = self.options, Draws(self.options.batch, self.options._generator)
        groups = [
            Group([p for weight in self.weights for p in weight.learned()], rule.lr, rule.schedule == "cosine"),
            Group(self.steps.logs, options.step_lr, cosine=True),
        ]
        adam, every = Adam(groups), max(1, options.iterations // options.checks)
        with torch.no_grad():
            self._compared(self.train[: options.batch])  # the first value, which all others are divided by
        best, kept = self._error(), self._state()
        with self._learning():
            for t in range(options.iterations):
                progress = t / options.iterations
                value = self._compared(draws.next(self.train))
                for term in regularizers(self.weights, progress):
                    value = value + term
                value.backward()
                self.steps.take_gradients()
                adam.step(progress)
                self.steps.write()
                self.data.here.advance(1)
                if (t + 1) % every == 0 or t + 1 == options.iterations:
                    error = self._error()
                    if error < best:
                        best, kept = error, self._state()
        self._restore(kept)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Gradients for the steps that are learned, and for nothing else in the model."""
        for parameter in self.data.here.model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights:
            for parameter in weight.learned():
                parameter.requires_grad_(True)
        for quantizer in self.moving:
            quantizer.step.requires_grad_(True)
        with torch.enable_grad():
            yield
        for quantizer in self.moving:
            quantizer.step.requires_grad_(False)

    def _compared(self, picks: Tensor) -> Tensor:
        """The loss of some images, as they are trained."""
        options, data = self.options, self.data
        x = data.float_inputs[picks] if options.input == "float" else data.inputs[picks]
        if options.input == "mixed":
            x = mixed(x, data.float_inputs[picks], options.keep, self.drops)
        return self.loss(data.here.unit.run(x), picks)

    @torch.no_grad()
    def _error(self) -> float:
        """The loss of the held images, or of all where none are, with the unit as it will be."""
        picks = self.held if len(self.held) else self.train
        with evaluating([*self.weights, *self.dropped.values()]):
            found = [
                float(self.loss(self.data.here.unit.run(self.data.inputs[part]), part)) * len(part)
                for part in picks.split(self.options.batch)
            ]
        return sum(found) / len(picks)

    def _parameters(self) -> list[nn.Parameter]:
        return [*(p for weight in self.weights for p in weight.learned()), *self.steps.logs]

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters()]

    @torch.no_grad()
    def _restore(self, kept: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters(), kept, strict=True):
            parameter.copy_(value)
        self.steps.write()
