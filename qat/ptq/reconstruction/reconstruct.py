"""Reconstruction of one unit after the other: BRECQ (ICLR 2021), QDrop (ICLR 2022) and what builds on them.

A unit reads what the quantized units before it give and is trained until it gives what the unit of the float model
gives. Weights are learned by a `WeightRule`, steps of activations as they are or as logarithms; all else stays.
Shapes: B images of a batch, n all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from qat.ptq.reconstruction.adam import Group
from qat.ptq.reconstruction.adaround import AdaRound
from qat.ptq.reconstruction.curriculum import Curriculum
from qat.ptq.reconstruction.learned_steps import LearnedSteps
from qat.ptq.reconstruction.learned_weights import LearnedWeight, WeightRule
from qat.ptq.reconstruction.losses import MSE, Logits, ReconstructionLoss
from qat.ptq.reconstruction.stand_in import Dropped, mixed, standing_in
from qat.ptq.reconstruction.training import Learned, Schedule, Training
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work
from qat.quantizers import Quantizer
from qat.ranges import Range, Seed, check_fields
from qat.sites.insert import WeightSite, weights

UnitInput = Literal["quantized", "float", "mixed"]


@dataclass
class ReconstructionOptions:
    """How long, and on how much at a time.

    Args:
        iterations: for each unit.
        batch: images of an iteration.
        step_lr: learning rate of the steps of activations, which falls to zero along half a cosine; 0 leaves them.
        log_steps: learn steps as logarithms, so that the rate is relative to their size.
        interval_lr: learning rate of the ends of intervals, which `DFQ` has in place of a step; 0 leaves them.
        held: share of the images that only choose between the states of a unit.
        checks: how many states are compared, beside the first one; the last of them is the end.
        autocast: products of the unit and of what follows it are computed in bfloat16, faster on a GPU.
        save_every: iterations between two states that a killed calibration can go on from.
        seed: draws batches and what is not quantized.
    """

    iterations: Annotated[int, Range(1, 10_000_000)] = 20_000
    batch: Annotated[int, Range(1, 100_000)] = 32
    step_lr: Annotated[float, Range(low=0, high=1)] = 4e-5
    log_steps: bool = False
    interval_lr: Annotated[float, Range(low=0, high=1)] = 4e-5
    held: Annotated[float, Range(low=0, below=1)] = 0.125
    checks: Annotated[int, Range(1, 10_000)] = 4
    autocast: bool = False
    save_every: Annotated[int, Range(1, 10_000_000)] = 500
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class Reconstruct(ReconstructionOptions, Step):
    """Train every unit, in the order of the network, to give the output of the float model.

    Args:
        weights: how weights are learned; null is AdaRound.
        loss: what the output of a unit is compared by; null is MSE.
        head_loss: what the output of the last unit, which are the logits, is compared by; null is Logits.
        input: what a unit reads: what the ``quantized`` units before it give, what the ``float`` ones give, or a value
            of either at random (``mixed``), with the probability ``keep`` for the quantized one.
        keep: probability with which a value of an activation is quantized while a unit is trained (QDrop: 0.5).
        curriculum: the order of the images; null for none.
    """

    weights: WeightRule | None = None
    loss: ReconstructionLoss | None = None
    head_loss: ReconstructionLoss | None = None
    input: UnitInput = "quantized"
    keep: Annotated[float, Range(low=2**-16, high=1)] = 1.0
    curriculum: Curriculum | None = None

    stage = Stage.RECONSTRUCT
    changes_weights = True
    needs_float = True
    needs_quantized = True

    @property
    def ticks(self) -> int:  # type: ignore[override]
        """Iterations."""
        return self.iterations + self.rule.ticks

    @property
    def rule(self) -> WeightRule:
        """How weights are learned."""
        return self.weights or AdaRound()

    def begin(self, work: Work) -> None:
        """Refuse a weight that the rule cannot learn."""
        for site in weights(work.model):
            if site.name in work.wanted and is_layer(site):
                self.rule.check(site)

    def finish(self, here: UnitWork) -> None:
        """Train the unit."""
        here.trainings += 1
        seed = self.seed + 1_000_003 * here.index  # a unit that starts anew draws the same
        self._generator = torch.Generator().manual_seed(seed)
        self._drops = torch.Generator(here.inputs[0].device).manual_seed(seed)
        rule, sites = self.rule, [site for site in here.wanted_weights() if is_layer(site)]
        activations = {
            name: quantizer for name, quantizer in here.wanted_activations().items()
            if not quantizer.replaces_softmax and not quantizer.reads_integers
        }  # fmt: skip
        if not sites and not activations:
            return
        data = UnitData(here)
        kind = (self.head_loss or Logits()) if here.is_last else (self.loss or MSE())

        @contextmanager
        def train(weights: Mapping[str, LearnedWeight]) -> Iterator[Training]:
            moving = LearnedSteps(activations.values(), self.step_lr > 0, self.log_steps, self.interval_lr > 0)
            groups = [Group(moving.steps, self.step_lr, cosine=True), Group(moving.ends, self.interval_lr, cosine=True)]
            loss, kept = kind.start(data), activations.items() if self.keep < 1 else ()
            dropped = {name: Dropped(quantizer, self.keep, self._drops) for name, quantizer in kept}
            with standing_in(here.model, {**weights, **dropped}):
                learned = Learned(weights, moving, groups, dropped, self._drops)
                inputs = partial(self._inputs, data)
                yield Training(data, inputs, loss, learned, self.batch, self.held, self.autocast)

        key, store = f"{here.trainings} {self!r}", here.work.method.store
        if store is not None and (state := store.state(key)) is not None:
            rule.restore(state["prepared"])
            for generator, drawn_before in zip((self._generator, self._drops), state["generators"], strict=True):
                generator.set_state(drawn_before)
        else:
            with parameters_kept(activations.values()):  # what is prepared moves them
                rule.prepare(sites, train, self._generator)
            if store is not None and rule.ticks:
                drawn = [generator.get_state() for generator in (self._generator, self._drops)]
                store.save_state(key, {"prepared": rule.prepared(), "generators": drawn})
        started = {site.name: rule.start(site, self._generator) for site in sites}
        learned = {name: weight for name, weight in started.items() if weight is not None}
        with train(learned) as training:
            if training.learned():
                schedule = Schedule(self.iterations, self.checks, self.curriculum, self.save_every)
                training.run(rule, schedule, self._generator, key)
        with torch.no_grad():
            for site in sites:
                if (weight := learned.get(site.name)) is not None:
                    site.weight.copy_(weight.folded(site.weight))
                    if weight.stays_float:
                        here.leave_float(site.name)
                        here.work.report.setdefault("bits_per_weight", {})[site.name] = weight.bits_per_weight

    def _inputs(self, data: UnitData, picks: Tensor) -> Tensor:
        """What the unit reads for some images, as it is trained."""
        if self.input == "mixed":
            return mixed(data.inputs[picks], data.float_inputs[picks], self.keep, self._drops)
        return (data.float_inputs if self.input == "float" else data.inputs)[picks]


@contextmanager
def parameters_kept(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Give quantizers, after the block, the values that they had before it."""
    start = [(parameter, parameter.detach().clone()) for q in quantizers for parameter in q.parameters()]
    yield
    with torch.no_grad():
        for parameter, value in start:
            parameter.copy_(value)


def is_layer(site: WeightSite) -> bool:
    """Whether a weight is that of a layer; tables are not learned."""
    return site.name.endswith("weight_quant")
