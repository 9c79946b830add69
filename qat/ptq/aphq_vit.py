"""APHQ-ViT (Wu et al., CVPR 2025, arXiv 2504.02508), without its reconstruction of MLPs, which changes the network.

Shapes: B images of a batch, n all images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qat.ptq.qdrop import QDrop
from qat.ptq.reconstruction.losses import PerFirst, ReconstructionLoss, Temperature, UnitLoss
from qat.ptq.reconstruction.unit_data import UnitData
from qat.ranges import Seed, check_fields


@dataclass
class APHQViT(QDrop):
    """`QDrop` whose errors are weighted by the perturbation Hessian.

    Args:
        loss: what the output of a unit is compared by; null is PerturbationHessian.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss = self.loss or PerturbationHessian()


@dataclass
class PerturbationHessian(ReconstructionLoss):
    """Errors weighted by how the gradient of the prediction moves with the output: one weight for each of its values.

    APHQ-ViT adds a small constant to the output, takes it away, and compares both gradients; in the limit, this is F 1.
    Behind a LayerNorm, which removes constants, F 1 is zero: what a program finds there is rounding noise. So here
    the values of an output are moved up and down at random, and the weight is |F r|, r signs: the size of a row of F.

    Args:
        temperature: T, which divides the logits.
        seed: draws the signs.
    """

    temperature: Temperature = 20.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, data: UnitData) -> UnitLoss:
        """Compute the weights, from the float model."""
        generator, total = torch.Generator().manual_seed(self.seed), torch.zeros_like(data.targets[0])
        for part in data.parts():
            out = data.targets[part]
            signs = torch.randint(2, out.shape, generator=generator).mul_(2).sub_(1).to(out)
            total += perturbed(data.rest, out, signs, self.temperature).abs().sum(0)
        weights, first = total / len(data), PerFirst()
        return UnitLoss(lambda out, picks: first(((out - data.targets[picks]).square() * weights).mean()), [first])


def perturbed(rest: Callable[[Tensor], Tensor], out: Tensor, move: Tensor, temperature: float) -> Tensor:
    """F r for every image (B, ...): the Fisher matrix of softmax(logits / T) at an output, times a tensor like it.

    F = J^T (diag(p) - p p^T) J / T^2, by one derivative forward and one backward.
    """
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about how it derives some of its functions
        logits, moved = forward_ad.unpack_dual(rest(forward_ad.make_dual(out, move)))
    probs, u = (logits / temperature).softmax(-1), moved / temperature
    v = probs * (u - (probs * u).sum(-1, keepdim=True))  # (diag(p) - p p^T) u
    with torch.enable_grad():
        out = out.detach().requires_grad_()
        return torch.autograd.grad((rest(out) / temperature * v).sum(), out)[0]
