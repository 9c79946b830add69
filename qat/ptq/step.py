"""A calibration is a list of steps, which work on one unit of the model after the other.

For every unit (the embedding, a block, a merging, the head), in the order of the network::

    rewrites -> first parameters of every site -> for every product of the unit: searches, weights, biases

so that each step sees what the units and the products before it, complete as they will be, make of the images. The
model is walked once; what is held is the input of one unit for all images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.ptq.base import PTQMethod, raise_unless_calibrated
from qat.ptq.cache import Cache
from qat.ptq.importance import row_importance
from qat.ptq.matrix_products import MatrixProduct, matrix_products
from qat.ptq.norms import unit_unchanged
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Prefix, Work
from qat.sites.family import Unit, family_of
from qat.sites.insert import quantizers, switched_off

CHECKED = 8  # images on which the function of a unit is compared before and after it is rewritten


class Stage(IntEnum):
    """When a step has its turn."""

    REWRITE = 1  # of float weights, without a change of what the float model computes
    INITIALIZE = 2  # the first parameters of every site
    SEARCH = 3  # better parameters
    WEIGHTS = 4  # weights that make up for errors of quantization, and their rounding
    BIAS = 5
    RECONSTRUCT = 6  # of a unit whose products are complete


class Step(PTQMethod):
    """A step of a calibration; alone, it is one that has only this step.

    Attributes:
        needs_float: it reads what reaches a layer in the float model.
        needs_quantized: it reads what quantized units give, so that ``prefix: float`` is refused.
        needs_logits: it reads the logits of the float model.
        ticks: into how many parts its progress on a unit is divided.
        comes_after, comes_before: the name of another step without which a list makes no sense.
    """

    needs_float = False
    needs_quantized = False
    needs_logits = False
    ticks = 0
    comes_after = ""
    comes_before = ""

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """When it has its turn; a subclass has a class attribute of this name."""

    def begin(self, work: Work) -> None:
        """Refuse, with QatError, a model or a recipe that the step cannot work on, before any work."""

    def model(self, work: Work, images: Tensor) -> None:
        """Do the work on the model as a whole, before that on its units; some normalized images are given."""

    def unit(self, here: UnitWork) -> None:
        """Do the work that concerns a unit as a whole, before that on its products."""

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Do the work on one product of a unit; the sites before it are complete."""

    def finish(self, here: UnitWork) -> None:
        """Do the work on a unit whose products are complete."""

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Run the step alone."""
        run(self, [self], model, batches)


def run(
    method: PTQMethod, steps: Sequence[Step], model: nn.Module, batches: Iterable[Tensor], prefix: Prefix = "quantized",
    importance: float = 0.0,
) -> None:  # fmt: skip
    """Run steps on a model in evaluation mode.

    Raises:
        QatError: a step refuses the model, a rewrite has changed what a unit computes, or no image reaches a site.
    """
    check_partners(steps)
    units = family_of(model).units(model)  # QatError, before any work, where the family is no chain
    work = Work.of(model, method)
    for step in steps:
        step.begin(work)
    if not work.wanted:
        return
    tensors = list(batches)
    if not tensors:
        raise QatError(f"no calibration image reached {next(iter(work.wanted))!r}: raise calibration.images")
    for step in steps:
        step.model(work, tensors[0][:CHECKED])
    keeps_float = any(step.needs_float for step in steps)
    cache = method.cache or Cache()
    with switched_off(quantizer for _, quantizer in quantizers(model)):
        cache.plan(units, tensors[0][:1], sum(map(len, tensors)), copies=1 + keeps_float)
    inputs: Sequence[Tensor] = tensors
    float_inputs = inputs if keeps_float else None
    products = matrix_products(model)
    if importance:
        corrected = [p for p in products if p.matrices.weight is not None and p.right in work.wanted]
        names = [p.right.rpartition(".")[0] for p in corrected]
        work.importance = row_importance(model, tensors, {name: model.get_submodule(name) for name in names})
        work.importance_share = importance
    if any(step.needs_logits for step in steps):
        work.logits = float_logits(model, units, tensors)
    ticks = 1 + sum(step.ticks for step in steps)
    with Progress("units" if ticks == 1 else "iterations", ticks * len(units)) as work.progress:
        for i, unit in enumerate(units, 1):
            here = UnitWork(work, unit, inputs, float_inputs, products, prefix, cache)
            if method.store is not None and method.store.has(here.index):
                method.store.restore(here)
            else:
                _apply(steps, here)
            inputs, float_inputs = here.outputs(), here.float_outputs
            work.progress.advance(i * ticks - work.progress.done)  # a step may have found nothing to do
    for name, quantizer in work.wanted.items():
        if quantizer.layout.batched and not quantizer.calibrated and name not in work.reached:
            raise QatError(f"no calibration image reached {name!r}: raise calibration.images")
        raise_unless_calibrated(name, quantizer)


@torch.no_grad()
def float_logits(model: nn.Module, units: Sequence[Unit], batches: Iterable[Tensor]) -> list[Tensor]:
    """What the float model makes of images: logits (B, classes) for every batch."""
    found = []
    with switched_off(quantizer for _, quantizer in quantizers(model)):
        for x in batches:
            for unit in units:
                x = unit.run(x)
            found.append(x)
    return found


def check_partners(steps: Sequence[Step]) -> None:
    """Raise QatError for a step without the one that has to come before, or after, it."""
    names = [type(step).__name__ for step in steps]
    for i, step in enumerate(steps):
        if step.comes_after and step.comes_after not in names[:i]:
            raise QatError(f"{names[i]} needs {step.comes_after} before it in the list of steps")
        if step.comes_before and step.comes_before not in names[i + 1 :]:
            raise QatError(f"{names[i]} needs {step.comes_before} after it in the list of steps")


def _apply(steps: Sequence[Step], here: UnitWork) -> None:
    """Run all steps on one unit."""
    rewrites = [step for step in steps if step.stage == Stage.REWRITE]
    if rewrites:
        with unit_unchanged(here.unit, here.inputs[0][:CHECKED], here.off):
            for step in rewrites:
                step.unit(here)
    store = here.work.method.store
    if store is not None:
        store.begin(here)
    here.remember()
    for step in steps:
        if step.stage == Stage.INITIALIZE:
            step.unit(here)
    here.start_rest()
    for step in steps:
        if step.stage > Stage.INITIALIZE:
            step.unit(here)
    for product in here.products:
        for step in steps:
            step.product(here, product)
        here.forget(product)
    for step in steps:
        step.finish(here)
    if store is not None:
        store.save(here)
