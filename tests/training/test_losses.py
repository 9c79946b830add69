"""Soft cross-entropy against a worked example. Shapes: B crops, C classes, k stored classes per crop."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.data.images import TopK
from qat.training.losses import soft_cross_entropy, sparse_soft_cross_entropy

CLASSES, PROBS = torch.tensor([[3, 7, 0, 9, 2]]), torch.tensor([[0.62, 0.15, 0.08, 0.05, 0.02]])
DENSE = torch.tensor([[0.08, 0.016, 0.02, 0.62, 0.016, 0.016, 0.016, 0.15, 0.016, 0.05]])
LOGITS = torch.tensor([[0.1, -0.4, 0.3, 2.0, 0.0, -1.0, 0.5, 1.2, -0.2, 0.7]])
LOSS = 1.5283861555
GRADIENT = [
    [-0.0238532, 0.0180547, 0.0485778, -0.2446086, 0.0348037, 0.0026896, 0.0677611, 0.0186742, 0.0255946, 0.0523061]
]


def dense(labels: TopK, classes: int) -> Tensor:
    """The same labels (B, C): the rest, never below zero, spread over the classes that are not stored."""
    rest = (1 - labels.probs.double().sum(1, keepdim=True)).clamp(min=0)
    filled = (rest / max(classes - labels.probs.shape[1], 1)).expand(-1, classes).clone()
    return filled.scatter(1, labels.classes, labels.probs.double())


def draw(batch: int, classes: int, k: int, sharpness: float = 3.0) -> tuple[Tensor, TopK]:
    """Logits (B, C) and the k most probable classes of another distribution."""
    generator = torch.Generator().manual_seed(0)
    logits, others = (torch.randn(batch, classes, generator=generator) for _ in range(2))
    probs, index = (sharpness * others).softmax(-1).topk(k)
    return logits, TopK(index, probs)


@pytest.mark.parametrize(
    "loss",
    [lambda z: soft_cross_entropy(z, DENSE), lambda z: sparse_soft_cross_entropy(z, TopK(CLASSES, PROBS))],
    ids=["dense", "sparse"],
)
def test_the_worked_example(loss):
    logits = LOGITS.clone().requires_grad_()
    value = loss(logits)
    value.backward()
    assert value.item() == pytest.approx(LOSS, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(GRADIENT), atol=1e-6, rtol=0)


def test_the_helper_of_this_file_spreads_the_rest():
    torch.testing.assert_close(dense(TopK(CLASSES, PROBS), 10).float(), DENSE)


@pytest.mark.parametrize(("classes", "k"), [(10, 1), (10, 5), (10, 9), (10, 10), (1000, 5)])
def test_sparse_labels_give_the_loss_and_gradient_of_dense_ones(classes, k):
    logits, labels = draw(8, classes, k)
    z_sparse, z_dense = logits.clone().requires_grad_(), logits.double().requires_grad_()
    sparse = sparse_soft_cross_entropy(z_sparse, labels)
    full = -(dense(labels, classes) * z_dense.log_softmax(-1)).sum(-1).mean()
    assert sparse.item() == pytest.approx(full.item(), abs=1e-5 if classes == 1000 else 1e-6)  # a sum of 1000 terms
    sparse.backward()
    full.backward()
    torch.testing.assert_close(z_sparse.grad, z_dense.grad.float(), atol=1e-6, rtol=0)


def test_all_classes_stored_leave_no_rest():
    logits, labels = draw(4, 10, 10)
    halved = TopK(labels.classes, labels.probs / 2)  # half of the mass is nowhere, and there is no other class
    loss = sparse_soft_cross_entropy(logits, halved)
    torch.testing.assert_close(loss, sparse_soft_cross_entropy(logits, labels) / 2)


def test_half_precision_probabilities_that_sum_above_one_leave_no_negative_rest():
    probs = torch.tensor([[0.9995, 0.0007]], dtype=torch.float16)
    assert probs.float().sum() > 1
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    loss = sparse_soft_cross_entropy(logits, TopK(torch.tensor([[2, 4]]), probs))
    log_probs = logits.log_softmax(-1)[0]
    assert loss.item() == pytest.approx(-(probs[0].float() @ log_probs[[2, 4]]).item(), abs=1e-6)


def test_half_precision_probabilities_are_summed_in_float32():
    logits, labels = draw(8, 1000, 5)
    half = labels._replace(probs=labels.probs.half())
    full = labels._replace(probs=labels.probs.half().float())
    assert sparse_soft_cross_entropy(logits, half).item() == sparse_soft_cross_entropy(logits, full).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_evaluated_in_float32(dtype):
    logits, labels = draw(8, 10, 5)
    for loss, target in ((soft_cross_entropy, dense(labels, 10).float()), (sparse_soft_cross_entropy, labels)):
        value = loss(logits.to(dtype), target)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(logits.to(dtype).float(), target))


def test_one_hot_labels_give_the_ordinary_cross_entropy():
    logits, labels = draw(8, 10, 1)
    sure = TopK(labels.classes, torch.ones(8, 1))
    expected = F.cross_entropy(logits, labels.classes[:, 0])
    torch.testing.assert_close(sparse_soft_cross_entropy(logits, sure), expected)


def test_a_perfect_student_pays_the_entropy_of_the_labels():
    assert soft_cross_entropy(DENSE.log(), DENSE).item() == pytest.approx(1.3418488842, abs=1e-6)
