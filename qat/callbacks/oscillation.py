"""Callbacks that track the oscillation of weights during training, and that stop it by freezing weights."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging

from qat.errors import QatError
from qat.ranges import Range, checked
from qat.runs.writing import replacing
from qat.sites.insert import WeightSite, weight_sites
from qat.training.module import QATModule
from qat.training.oscillation import Freezable, Oscillation
from qat.training.regularizers.base import LOW_BITS
from qat.training.schedules import cosine_between

Frequency = Annotated[float, Range(above=0, below=1)]
Steps = Annotated[int, Range(1, 1_000_000_000)]
CODE_BITS = 8  # wider codes would take four bytes each in the state of a checkpoint


@dataclass(frozen=True)
class OscillationRow:
    """One weight, or the sum over several, of `oscillation.csv`."""

    site: str
    bits: str
    weights: int
    share: float  # of the weights whose frequency is above the threshold, 0 to 1
    oscillations: int  # since training started
    oscillations_per_update: float
    frozen: float  # share of the weights that are frozen, 0 to 1

    @classmethod
    def merge(cls, site: str, rows: list[OscillationRow]) -> OscillationRow:
        """The weights of several rows taken together."""
        weights = sum(row.weights for row in rows)
        share, frozen = (sum(r.weights * value for r, value in zip(rows, values, strict=True)) / weights
                         for values in ([r.share for r in rows], [r.frozen for r in rows]))  # fmt: skip
        counts = sum(row.oscillations for row in rows), sum(row.oscillations_per_update for row in rows)
        bits = "+".join(sorted({row.bits for row in rows}, key=int))
        return cls(site, bits, weights, share, *counts, frozen)


class OscillationTracker(L.Callback):
    """Counts how many weights oscillate between codes, for the metrics and for ``oscillation.csv``.

    The metrics are ``oscillation/low_bit`` (weights below 8 bits) and ``oscillation/8_bit``: the share, 0 to 1, of the
    weights whose frequency is above the threshold. A frequency means little without its momentum: with 0.01 a single
    oscillation stays above a threshold of 0.005 for 68 updates, with 0.001 six are needed to pass it.

    Args:
        momentum: weight of the newest observation in the running frequency.
        threshold: frequency above which a weight counts as oscillating.
        every: optimizer steps between two comparisons of the codes.
        log_every: optimizer steps between two entries in the metrics.
    """

    @checked
    def __init__(
        self, momentum: Frequency = 0.01, threshold: Frequency = 0.005, every: Steps = 1, log_every: Steps = 100
    ) -> None:
        self.momentum, self.threshold, self.every, self.log_every = momentum, threshold, every, log_every
        self.updates = 0
        self._states: dict[str, Oscillation] = {}
        self._sites: list[WeightSite] = []
        self._restored: dict[str, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the codes that training starts with, or restore the state of a checkpoint."""
        assert isinstance(pl_module, QATModule)
        self._sites, self._step = self.choose(pl_module), trainer.global_step
        self._states = {site.name: self.track(site) for site in self._sites}
        for name, state in self._restored.items():
            if name in self._states:
                self._states[name].load_state_dict(state)

    def choose(self, module: QATModule) -> list[WeightSite]:
        """The weights that are tracked."""
        return weight_sites(module.model, max_bits=CODE_BITS)

    def track(self, site: WeightSite) -> Oscillation:
        """The state of one weight."""
        return Oscillation(site.quantizer.encode(site.weight.detach()), self.momentum)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the codes after an optimizer step."""
        if trainer.global_step == self._step:
            return  # gradients are still being accumulated
        self._step = trainer.global_step
        if self._step % self.every == 0:
            self.look(trainer)
        if self._step % self.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.metrics(), self._step - 1)  # the step just done, as Lightning counts

    @torch.no_grad()
    def look(self, trainer: L.Trainer) -> None:
        """Update the state of every weight with its code."""
        self.updates += 1
        for site in self._sites:
            self._states[site.name].update(site.quantizer.encode(site.weight))

    def metrics(self) -> dict[str, float]:
        """The shares of low-bit and of 8-bit weights, by the name of the metric."""
        return {f"oscillation/{row.site}": row.share for row in self.totals(self.rows())}

    def rows(self) -> list[OscillationRow]:
        """One row per weight."""
        return [self._row(site, self._states[site.name]) for site in self._sites]

    def totals(self, rows: list[OscillationRow]) -> Iterator[OscillationRow]:
        """One row for all low-bit weights and one for all 8-bit weights, where there are some."""
        for name, low in (("low_bit", True), ("8_bit", False)):
            if chosen := [row for row in rows if (int(row.bits) <= LOW_BITS) is low]:
                yield OscillationRow.merge(name, chosen)

    def _row(self, site: WeightSite, state: Oscillation) -> OscillationRow:
        total = int(state.total)
        frozen = float(state.frozen.float().mean()) if isinstance(state, Freezable) else 0.0
        bits, share = str(site.quantizer.spec.width), float(state.share(self.threshold))
        return OscillationRow(site.name, bits, site.weight.numel(), share, total, total / max(self.updates, 1), frozen)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table of all weights."""
        if self._sites and trainer.is_global_zero:
            self.write(Path(trainer.default_root_dir) / "oscillation.csv")

    on_train_end = on_validation_end

    def write(self, path: Path) -> None:
        """The table, one line per weight, then the totals; momentum and threshold are in its last columns."""
        rows = self.rows()
        settings = {"momentum": self.momentum, "threshold": self.threshold, "every": self.every}
        with replacing(path) as file:
            writer = csv.DictWriter(file, [field.name for field in fields(OscillationRow)] + list(settings))
            writer.writeheader()
            writer.writerows(asdict(row) | settings for row in [*rows, *self.totals(rows)])

    def state_dict(self) -> dict[str, Any]:
        """The state of every weight: 4 bytes each, 6 with a momentum below 0.005; freezing adds 5."""
        return {"updates": self.updates, "states": {name: s.state_dict() for name, s in self._states.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self.updates, self._restored = state_dict["updates"], state_dict["states"]


class IterativeFreezing(OscillationTracker):
    """Freezes weights that oscillate too often at the code that they had on average (Nagel et al. 2022, section 4.3).

    A frozen latent weight is set to step * code after every optimizer step, so its code stays while the step still
    learns, and a checkpoint can be used without this callback. A weight average is refused: it would
    still contain values from before a weight was frozen.

    Args:
        freeze_above: frequency above which a weight is frozen, when training starts.
        freeze_above_at_end: the same when training ends; a cosine leads there. ``freeze_above`` when null.
        momentum: weight of the newest observation in the running frequency and mean code.
        threshold: frequency above which a weight counts as oscillating in the metrics.
        max_bits: widest weight that is tracked and frozen.
        log_every: optimizer steps between two entries in the metrics.
    """

    @checked
    def __init__(
        self,
        freeze_above: Frequency = 0.02,
        freeze_above_at_end: Frequency | None = None,
        momentum: Frequency = 0.01,
        threshold: Frequency = 0.005,
        max_bits: Annotated[int, Range(2, CODE_BITS)] = LOW_BITS,
        log_every: Steps = 100,
    ) -> None:
        super().__init__(momentum, threshold, 1, log_every)
        self.first = freeze_above
        self.last = freeze_above if freeze_above_at_end is None else freeze_above_at_end
        self.max_bits = max_bits

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise QatError where the run has a weight average."""
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise QatError("IterativeFreezing and a weight average do not go together: leave one of the callbacks out")

    def choose(self, module: QATModule) -> list[WeightSite]:
        """The weights that are tracked and frozen."""
        return weight_sites(module.model, max_bits=self.max_bits)

    def track(self, site: WeightSite) -> Freezable:
        """The state of one weight."""
        return Freezable(site.quantizer.encode(site.weight.detach()), self.momentum)

    @torch.no_grad()
    def look(self, trainer: L.Trainer) -> None:
        """Update every state, freeze what oscillates, and set frozen weights to step * code with the present step."""
        super().look(trainer)
        module = trainer.lightning_module
        assert isinstance(module, QATModule)
        threshold = cosine_between(module.progress, self.first, self.last)
        for site in self._sites:
            state = self._states[site.name]
            assert isinstance(state, Freezable)
            state.freeze(threshold)
            site.weight.copy_(torch.where(state.frozen, site.quantizer.decode(state.codes), site.weight))
