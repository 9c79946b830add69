"""Which parameters are decayed, and which learn at a rate of their own."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qat.sites.insert import quantizers

EMBEDDINGS = ("pos_embed", "cls_token", "dist_token", "reg_token")


def param_groups(
    model: nn.Module, weight_decay: float, lr: float, step_lr: float, undivided: bool = False
) -> list[dict[str, Any]]:
    """Groups for an optimizer: steps and offsets at rate ``step_lr``, the rest at ``lr``; only weights are decayed.

    timm leaves biases, norms and other one-dimensional parameters undecayed; `EMBEDDINGS` are undecayed too. The groups
    are the same for every ``weight_decay``, zero too, so that a run can resume with another one.

    Args:
        model: the quantized model.
        weight_decay: of the weights.
        lr: of all but steps and offsets.
        step_lr: of steps and offsets.
        undivided: without decay there is one group beside the steps, as older versions of qat made and stored it.
    """
    own: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, float(not undivided), no_weight_decay_list={*own, *EMBEDDINGS})
    steps = [p for _, quantizer in quantizers(model) for p in quantizer.parameters() if p.requires_grad]
    taken = {id(p) for p in steps}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
        group["lr"] = lr
        group["weight_decay"] *= weight_decay
    groups.append({"params": steps, "weight_decay": 0.0, "lr": step_lr})
    return [group for group in groups if group["params"]]


def regroup(optimizer: Optimizer, schedule: LambdaLR, groups: list[dict[str, Any]], **options: Any) -> None:
    """Give an optimizer that was restored from a checkpoint the rates, decays and options of ``groups``, in place.

    With the same settings as before, every learning rate stays the same to the bit.
    """
    schedule.base_lrs = [group["lr"] for group in groups]
    for group, wanted, factor in zip(optimizer.param_groups, groups, schedule.lr_lambdas, strict=True):
        rate = wanted["lr"] * factor(schedule.last_epoch)
        group |= {"initial_lr": wanted["lr"], "lr": rate, "weight_decay": wanted["weight_decay"], **options}
