"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn

EMBEDDINGS = ("pos_embed", "cls_token", "dist_token", "reg_token")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: steps, offsets, biases, norms and embeddings are not decayed, weights are.

    timm leaves one-dimensional parameters undecayed, which covers steps and offsets (G,); the embeddings are named
    here as well as by the model, because a model wrapped in another loses its own list.
    """
    own: set[str] = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = param_groups_weight_decay(
        model, weight_decay, no_weight_decay_list={*own, *EMBEDDINGS}
    )
    return groups
