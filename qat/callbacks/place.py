"""The module moves to its device first, so that whatever the other callbacks make of it is made there."""

from __future__ import annotations

import logging

import lightning as L

from qat.quantizers.kernels import compiled
from qat.training.module import QATModule

log = logging.getLogger(__name__)


class PlaceModule(L.Callback):
    """Moves the module to the device of the trainer and, with ``model.compile``, tries the compiler there.

    Lightning moves a module only after the ``setup`` of all callbacks. A weight average is made in its ``setup``, on
    the device where it finds the module, and stays there. So this callback has to be the first.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise QatError where there is no compiler, before anything takes time; then move the module."""
        assert isinstance(pl_module, QATModule)
        device = trainer.strategy.root_device
        if pl_module.options.compile:
            compiled(device.type)
            if eager := pl_module.uncompiled:
                kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(eager.items()))
                log.info("model.compile: these quantizers have no compiled arithmetic and stay as they are: %s", kinds)
        pl_module.to(device)
