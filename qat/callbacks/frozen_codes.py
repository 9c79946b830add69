"""Training whose first part keeps the codes of weights, while steps, offsets, biases and norms learn."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from typing import Annotated, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.ranges import Range, checked
from qat.sites.insert import WeightSite, weight_sites, weights
from qat.training.module import QATModule

log = logging.getLogger(__name__)

Share = Annotated[float, Range(above=0, high=1)]


class FrozenCodes(L.Callback):
    """Keeps the codes of weights for the first part of training, as EfficientQAT (arXiv 2407.11062) does for all of it.

    A model that starts from a good calibration first finds steps, biases and norms that suit its codes. A weight is
    codes times step meanwhile, also in a checkpoint, so that it can be used and resumed like any other.

    Args:
        share: of all optimizer steps, after which weights learn too.
        sites: glob over the names of weight sites.
    """

    @checked
    def __init__(self, share: Share = 0.25, sites: str = "*.weight_quant") -> None:
        self.share, self.sites = share, sites
        self._released = False
        self._held: list[tuple[WeightSite, Tensor]] = []  # weights and their codes
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a glob that matches nothing, before the model is calibrated."""
        assert isinstance(pl_module, QATModule)
        weight_sites(pl_module.model, self.sites)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the codes of the weights as they are, unless a run resumes after this part."""
        assert isinstance(pl_module, QATModule)
        if not any(fnmatchcase(site.name, self.sites) for site in weights(pl_module.model)):
            log.warning("FrozenCodes: the calibration left all weights of %s in floating point", self.sites)
        elif pl_module.progress < self.share and not self._released:
            for site in weight_sites(pl_module.model, self.sites):
                codes = site.quantizer.encode(site.weight.detach())
                self._held.append((site, codes))
                self._hooks.append(site.quantizer.register_forward_hook(_Values(codes)))
            self._write()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the weights the values of their codes at the present steps; let them learn when the part is over."""
        assert isinstance(pl_module, QATModule)
        self._write()
        if self._held and pl_module.progress >= self.share:
            self._forget_moments(trainer)
            self._release()
            self._released = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave nothing in the model."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing in the model."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Whether weights learn by now, so that a longer run does not hold them again."""
        return {"released": self._released}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._released = state_dict["released"]

    def _forget_moments(self, trainer: L.Trainer) -> None:
        """Let AdamW begin anew for the weights: its first steps are too large after many gradients of zero."""
        for optimizer in trainer.optimizers:
            for site, _ in self._held:
                if "step" in optimizer.state.get(site.weight, {}):
                    optimizer.state[site.weight]["step"].zero_()

    @torch.no_grad()
    def _write(self) -> None:
        for site, codes in self._held:
            site.weight.copy_(site.quantizer.decode(codes))

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._held = [], []


class _Values:
    """Takes the place of what a quantizer of a weight gives: the values of codes, which depend on its steps alone."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __call__(self, quantizer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        values: Tensor = quantizer.decode(self.codes)  # type: ignore[operator]
        fixed = values.detach()
        values = fixed + (values - fixed) * quantizer.gain(args[0])  # type: ignore[operator]
        return torch.add(values.to(out.dtype), args[0], alpha=0)  # so that the weight has a gradient, of zero
