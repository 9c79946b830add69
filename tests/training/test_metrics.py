"""What is measured while a model is trained."""

from __future__ import annotations

import pytest
import torch

from qat.training.metrics import HeldOutMetrics, ValidationMetrics

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
LABELS = torch.tensor([0, 0, 0])


def test_validation_counts_hits_and_means_over_images():
    metrics = ValidationMetrics(2)
    metrics.update(LOGITS[:1], LABELS[:1])
    metrics.update(LOGITS[1:], LABELS[1:])
    assert int(metrics.images) == 3
    found = metrics.take()
    assert found["val/top1"] == pytest.approx(200 / 3)
    assert found["val/top5"] == 100
    # log(1 + e^-2), log(1 + e), log(1 + e^-3): 0.126928, 1.313262, 0.048587
    assert found["val/loss"] == pytest.approx((0.126928 + 1.313262 + 0.048587) / 3, abs=1e-5)  # float32
    assert int(metrics.images) == 0


def test_with_a_teacher_distance_and_agreement_are_those_to_its_predictions():
    metrics = HeldOutMetrics(has_teacher=True)
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    metrics.update(LOGITS, LABELS, teacher)
    found = metrics.take()
    # the first two agree: KL 0. The third: teacher (1/2, 1/2), student (0.952574, 0.047426)
    # -> (log(0.5 / 0.952574) + log(0.5 / 0.047426)) / 2 = 0.855440
    assert found["held_out/kl"] == pytest.approx(0.855440 / 3, abs=1e-5)
    assert found["held_out/agreement"] == 100  # the first of equal classes


def test_without_one_they_are_loss_and_top1():
    metrics = HeldOutMetrics(has_teacher=False)
    metrics.update(LOGITS, LABELS, None)
    found = metrics.take()
    assert found["held_out/loss"] == pytest.approx(0.496259, abs=1e-5)
    assert found["held_out/top1"] == pytest.approx(200 / 3)
