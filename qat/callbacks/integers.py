"""Evaluation with products of integers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import lightning as L

from qat.errors import QatError
from qat.integer import rows, use_integers
from qat.training.module import QATModule

log = logging.getLogger(__name__)


class IntegerProducts(L.Callback):
    """Lets a validation multiply integers in place of the values that codes stand for, see `qat.integer`."""

    def __init__(self) -> None:
        self._simulated: Any = None
        self.found: dict[str, int] = {}  # for the results: how many products, and the widest accumulator

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the model that multiplies integers in the place of the other one; QatError elsewhere than on a CPU."""
        assert isinstance(pl_module, QATModule)
        if pl_module.device.type != "cpu":
            raise QatError("--integer true: torch multiplies int32 on a CPU alone: add --trainer.accelerator cpu")
        if trainer.precision != "32-true":
            raise QatError(
                "--integer true needs float32 between products: leave trainer.precision out, it is " + trainer.precision
            )
        self._simulated = pl_module.model
        pl_module.model = use_integers(copy.deepcopy(pl_module.model))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was computed with integers, and put the model back."""
        assert isinstance(pl_module, QATModule)
        found = [row for row in rows(pl_module.model) if row.is_product]
        integer = [row for row in found if row.integer]
        bits, others = max((row.bits for row in integer), default=0), [row.name for row in found if not row.integer]
        told = f"; in floating point: {', '.join(others)}" if others else ""
        counts = len(integer), len(found), bits
        log.info("%d of %d products multiplied integers, in accumulators of %d bits at most%s", *counts, told)
        self.found = dict(zip(("integer", "all", "accumulator_bits"), counts, strict=True))
        self._put_back(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the model back."""
        self._put_back(pl_module)

    def _put_back(self, pl_module: L.LightningModule) -> None:
        if self._simulated is not None:
            pl_module.model, self._simulated = self._simulated, None
