"""Losses of reconstruction: by hand, and against derivatives taken another way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.ptq.aphq_vit import PerturbationHessian, perturbed
from qat.ptq.brecq import FisherDiagonal, fisher_weights
from qat.ptq.fima_q import FisherLowRank
from qat.ptq.glf_q import SuffixFeature
from qat.ptq.pd_quant import Prediction
from qat.ptq.reconstruction.losses import MSE, Logits, PerFirst, ReconstructionLoss
from qat.ptq.reconstruction.reconstruct import Reconstruct
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Steps
from qat.ptq.unit_work import UnitWork
from qat.sites.family import family_of
from qat.sites.insert import quantizers, switched_off
from tests.ptq.test_output_search import batches, tiny

LOSSES = [MSE(), FisherDiagonal(), PerturbationHessian(), Prediction(), Logits(), SuffixFeature(), FisherLowRank()]


class Seen(Step):
    """Hands the data of one unit to a function."""

    stage = Stage.RECONSTRUCT
    needs_float = True

    def __init__(self, name: str, see) -> None:
        self.name, self.see, self.found = name, see, 0

    def finish(self, here: UnitWork) -> None:
        if here.unit.name == self.name:
            self.see(UnitData(here))
            self.found += 1


def with_data(name: str, see, model: nn.Module | None = None) -> None:
    step = Seen(name, see)
    step(model or tiny(), batches())
    assert step.found == 1


def test_the_worked_example_of_the_diagonal():
    D, g = torch.tensor([[0.1, -0.2], [0.3, 0]]), torch.tensor([[2, 1], [0.5, 4]])
    for damped, expected in ((False, 0.05125), (True, 0.22625)):
        assert float((D.square() * fisher_weights(g, damped)).sum(1).mean()) == pytest.approx(expected)


def test_a_first_value_divides_all_others():
    first = PerFirst()
    assert [float(first(torch.tensor(x))) for x in (4.0, 2.0, 6.0)] == [1, 0.5, 1.5]
    zero = PerFirst()
    assert [float(zero(torch.tensor(x))) for x in (0.0, 2.0)] == [0, 2]


def test_the_fisher_matrix_times_a_vector_against_its_definition():
    """F = J^T (diag p - p p^T) J / T^2 for every image, from the whole Jacobian, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 5)).double()
    out, move, T = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64), 20.0
    for x, r, found in zip(out, move, perturbed(net, out, move, T), strict=True):
        J = torch.autograd.functional.jacobian(net, x)
        p = (net(x) / T).softmax(0)
        fisher = J.T @ (p.diag() - p.outer(p)) @ J / T**2
        torch.testing.assert_close(found, fisher @ r)


def test_it_is_the_limit_of_the_difference_of_gradients():
    """Gradients of KL after a small move there and back, at temperature 20."""

    def see(data: UnitData) -> None:
        out, eps, T = data.targets[:2].double(), 1e-4, 20.0
        model = data.here.model.double()
        target = (data.rest(out) / T).log_softmax(-1)

        def gradient(shifted: Tensor) -> Tensor:
            with torch.enable_grad():
                shifted = shifted.detach().requires_grad_()
                found = (data.rest(shifted) / T).log_softmax(-1)
                loss = F.kl_div(found, target, reduction="sum", log_target=True)
                return torch.autograd.grad(loss, shifted)[0]

        move = torch.randn(out.shape, dtype=out.dtype)
        difference = (gradient(out + eps * move) - gradient(out - eps * move)) / (2 * eps)
        torch.testing.assert_close(perturbed(data.rest, out, move, T), difference, rtol=1e-4, atol=1e-9)
        ones = perturbed(data.rest, out, torch.ones_like(out), T)
        assert float(ones.norm()) < 1e-9 * float(difference.norm()), "the paper's move is one that a LayerNorm removes"
        model.float()

    with_data("blocks.0", see)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_loss_is_zero_for_the_float_output_and_has_a_gradient_elsewhere(loss: ReconstructionLoss):
    def see(data: UnitData) -> None:
        value, picks = loss.start(data), torch.tensor([0, 3])
        value.refresh(0)
        with torch.enable_grad():
            out = (data.targets[picks] + 0.1 * torch.randn(data.targets[picks].shape)).requires_grad_()
            first = value(out, picks)
            first.backward()
        assert out.grad is not None
        assert bool(out.grad.isfinite().all())
        terms = 2 if isinstance(loss, FisherLowRank) else 1 + getattr(loss, "local", 0)
        assert float(first) == pytest.approx(terms, abs=1e-5)
        assert float(value(data.targets[picks], picks)) == pytest.approx(0, abs=1e-5)

    with_data("blocks.0", see)


def test_weights_of_images_are_those_of_the_images_that_are_picked():
    def see(data: UnitData) -> None:
        value, noise = FisherDiagonal().start(data), torch.randn_like(data.targets[:])
        each = [float(value(data.targets[i : i + 1] + noise[i : i + 1], torch.tensor([i]))) for i in range(4)]
        order = torch.tensor([2, 0])
        both = float(value(data.targets[order] + noise[order], order))
        assert both == pytest.approx((each[2] + each[0]) / 2, rel=1e-4)

    with_data("blocks.1", see)


@pytest.mark.parametrize("name", ["deit", "swin", "sret"])
def test_the_feature_is_what_the_head_reads(name):
    """In the last block of DeiT, only the class token has any part in it."""
    model = tiny(name)
    names = [unit.name for unit in family_of(model).units(model)]

    def see(data: UnitData) -> None:
        value = SuffixFeature(local=0).start(data)
        out = data.targets[:2].clone()
        if name == "deit":
            out[:, 1:] += 1
            assert float(value(out, torch.arange(2))) == 0
        out[:, :1] += 1
        assert float(value(out, torch.arange(2))) > 0

    with_data(names[-2], see, model)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_reconstruction_by_every_loss_brings_logits_nearer(loss: ReconstructionLoss):
    """Straight-through weights on the images that are compared: only the loss can fail here."""
    from qat.ptq.reconstruction.straight_through import StraightThrough

    plain, trained = tiny(), tiny()
    start = Steps([Reconstruct(weights=StraightThrough(lr=1e-3), iterations=1, batch=4, held=0)])
    start(plain, batches())
    Reconstruct(weights=StraightThrough(lr=1e-3), loss=loss, iterations=60, batch=4, held=0)(trained, batches())
    with torch.no_grad():
        images = torch.cat(batches())
        float_model = tiny()
        with switched_off(quantizer for _, quantizer in quantizers(float_model)):
            target = float_model(images)
        errors = [float((model(images) - target).square().mean()) for model in (plain, trained)]
    assert errors[1] < 0.6 * errors[0]
