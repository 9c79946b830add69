"""The gradient of the regularizers in relation to that of the main loss."""

from __future__ import annotations

from typing import Annotated

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qat.ranges import Range, checked
from qat.training.module import QATModule


class GradientRatio(L.Callback):
    """Logs ``train/<regularizer>_gradient_ratio``: the norm of its gradient over that of the main loss.

    Both norms are taken over the weights that it regularizes, before clipping. A ratio of 1e-4 says that the
    regularizer does nothing. The regularizers are evaluated once more in such a step; the main loss is not.

    Args:
        every: optimizer steps between two entries in the metrics.
    """

    @checked
    def __init__(self, every: Annotated[int, Range(1, 1_000_000_000)] = 100) -> None:
        self.every = every

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Split the gradients that the step is about to use."""
        assert isinstance(pl_module, QATModule)
        step = trainer.global_step
        if (step + 1) % self.every == 0 and (ratios := gradient_ratios(pl_module)):
            for logger in trainer.loggers:
                logger.log_metrics({f"train/{name}_gradient_ratio": ratio for name, ratio in ratios.items()}, step)


def gradient_ratios(module: QATModule) -> dict[str, float]:
    """The ratio of each active regularizer, by name; ``.grad`` must hold the sum of the gradients of all losses."""
    parts = {name: _gradients(penalty, module.model) for name, penalty in module.penalties.at(module.progress)}
    if not parts:
        return {}
    main = {p: p.grad.float() for part in parts.values() for p in part if p.grad is not None}
    for part in parts.values():
        main = {p: grad - part[p] if p in part else grad for p, grad in main.items()}
    return {name: _ratio(part, main) for name, part in parts.items()}


def _gradients(penalty: Tensor, model: nn.Module) -> dict[nn.Parameter, Tensor]:
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    grads = torch.autograd.grad(penalty, weights, allow_unused=True)
    return {p: grad for p, grad in zip(weights, grads, strict=True) if grad is not None}


def _ratio(part: dict[nn.Parameter, Tensor], main: dict[nn.Parameter, Tensor]) -> float:
    own = torch.stack([grad.square().sum() for grad in part.values()]).sum()
    rest = torch.stack([main[p].square().sum() for p in part]).sum()
    return float((own / rest).sqrt())
