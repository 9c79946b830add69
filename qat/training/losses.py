"""Losses on soft labels. Shapes: B crops, C classes, k stored classes per crop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.data.images import TopK


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """Mean over B of -sum_c p_c log softmax(z)_c, with dense labels ``probs`` (B, C)."""
    return -(probs * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def sparse_soft_cross_entropy(logits: Tensor, labels: TopK) -> Tensor:
    """The same with the k most probable classes of each crop; the rest of the probability is spread over the others.

    No dense label (B, C) is built. The rest is clamped at 0: probabilities in half precision can sum to more than 1.
    """
    log_probs, probs = F.log_softmax(logits.float(), dim=-1), labels.probs.float()  # (B, C), (B, k)
    top = log_probs.gather(1, labels.classes)  # (B, k)
    rest = (1 - probs.sum(1)).clamp(min=0)
    others = log_probs.shape[1] - probs.shape[1]
    loss = (probs * top).sum(1)
    if others:
        loss = loss + rest / others * (log_probs.sum(1) - top.sum(1))
    return -loss.mean()


def cross_entropy(logits: Tensor, labels: Tensor | TopK) -> Tensor:
    """Mean over B for any kind of label: classes (B,) int64, probabilities (B, C), or sparse probabilities."""
    if isinstance(labels, TopK):
        return sparse_soft_cross_entropy(logits, labels)
    return soft_cross_entropy(logits, labels) if labels.ndim == 2 else F.cross_entropy(logits.float(), labels)


def entropy(labels: Tensor | TopK, classes: int) -> Tensor:
    """Mean over B of the entropy of soft labels, dense (B, C) or sparse: the loss of a perfect student."""
    if isinstance(labels, TopK):
        probs = labels.probs.float()
        rest, others = (1 - probs.sum(1)).clamp(min=0), classes - probs.shape[1]
        each = torch.special.entr(probs).sum(1) + (others * torch.special.entr(rest / others) if others else 0)
    else:
        each = torch.special.entr(labels).sum(1)
    mean: Tensor = each.mean()
    return mean
