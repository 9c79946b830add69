"""What is measured on validation images, and on training images that are held out, in training.

Both are exact over all images, however they are batched and spread over processes. Shapes: B images of a batch, C
classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

BY_TEACHER, BY_LABEL = "held_out/kl", "held_out/loss"  # what the best checkpoint has least of, with and without teacher


class ValidationMetrics(nn.Module):
    """Top-1 and top-5 in percent, the mean cross-entropy on labels, and the number of images.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
        self.loss = MeanMetric(nan_strategy=torch.nan)  # keep it: without it, nothing would seem to be validated

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: float32 logits (B, C) and labels (B,)."""
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        self.loss.update(F.cross_entropy(logits, labels), weight=len(labels))

    @property
    def images(self) -> Tensor:
        """How many this process has added."""
        count: Tensor = self.loss.weight
        return count

    def take(self) -> dict[str, Tensor]:
        """Their values by the names in the log; they begin anew."""
        found = {
            "val/top1": 100 * self.top1.compute(),
            "val/top5": 100 * self.top5.compute(),
            "val/loss": self.loss.compute(),
        }
        for metric in (self.top1, self.top5, self.loss):
            metric.reset()
        return found


class HeldOutMetrics(nn.Module):
    """How far a student is from its teacher: KL(teacher || student), and how often both choose the same class.

    Without a teacher: the cross-entropy on labels, and top-1. Shares are in percent.

    Args:
        has_teacher: what the logits are compared with.
    """

    def __init__(self, has_teacher: bool) -> None:
        super().__init__()
        self.names = (BY_TEACHER, "held_out/agreement") if has_teacher else (BY_LABEL, "held_out/top1")
        self.distance, self.agreement = MeanMetric(nan_strategy=torch.nan), MeanMetric()

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> None:
        """Add a batch.

        Args:
            logits: float32 (B, C) of the student.
            labels: (B,) of the images.
            teacher: float32 logits (B, C) of the teacher, where there is one.
        """
        if teacher is None:
            distance = F.cross_entropy(logits, labels, reduction="none")
        else:
            target, labels = teacher.log_softmax(-1), teacher.argmax(-1)
            distance = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
        self.distance.update(distance)
        self.agreement.update(100.0 * (logits.argmax(-1) == labels))

    @property
    def images(self) -> Tensor:
        """How many this process has added."""
        count: Tensor = self.distance.weight
        return count

    def take(self) -> dict[str, Tensor]:
        """Their values by the names in the log; they begin anew."""
        found = dict(zip(self.names, (self.distance.compute(), self.agreement.compute()), strict=True))
        self.distance.reset()
        self.agreement.reset()
        return found
