"""Rotation of the residual stream: outliers of single channels spread over all of them.

Where every branch of a pre-norm transformer begins with a LayerNorm, the stream x may be any Q C x: C takes the mean of
the channels away, which a LayerNorm does in any case, and Q is orthogonal with Q 1 = 1, so that mean and variance, and
what the LayerNorm makes of x, stay what they were but for Q. With gamma and beta of the LayerNorm moved into the layers
that read it, and Q into what writes to the stream and what reads it::

    writers:  Q C W,  Q C b        tokens, positions:  Q C p        readers:  W diag(gamma) Q^T,  b + W beta

The float model stays the same, and running it costs no more. QuaRot (arXiv 2404.00456) and GLF-Q rotate so; they
replace the LayerNorms, which is not needed. Shapes: C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.norms import unit_unchanged
from qat.ptq.step import Stage, Step
from qat.ptq.work import Work
from qat.ranges import Seed, check_fields
from qat.sites.family import Stream, Unit, family_of
from qat.sites.insert import quantizers

REPORT = "residual_rotation"  # what the report of a calibration calls the seed


@dataclass
class RotateResidual(Step):
    """Rotate the residual stream of a model by a random orthogonal matrix.

    The outputs of blocks are then those of the float model times that matrix.

    Args:
        seed: draws the matrix.
        optional: a model without such a stream is left as it is; otherwise it is refused.
    """

    seed: Seed = 0
    optional: bool = False

    stage = Stage.REWRITE
    changes_weights = True

    def __post_init__(self) -> None:
        check_fields(self)

    def begin(self, work: Work) -> None:
        """Find the stream; QatError where there is none, or where a part of the model is calibrated already."""
        self._stream = family_of(work.model).stream(work.model)
        if not work.is_open(name for name, _ in quantizers(work.model)):
            self._stream = None
        if work.wanted and self._stream is None and not self.optional:
            raise QatError(
                "RotateResidual finds no residual stream that only LayerNorms read, in a model of which nothing is "
                "calibrated yet: leave it out"
            )

    def model(self, work: Work, images: Tensor) -> None:
        """Rotate the stream, and check that the float model stays the same."""
        if self._stream is not None:
            with unit_unchanged(Unit("the model", work.model), images, (site for _, site in quantizers(work.model))):
                rotate_stream(work.model, self._stream, self.seed)
            work.report[REPORT] = self.seed


def rotate_residual(model: nn.Module, seed: int) -> None:
    """Rotate the stream of a float or quantized model as `RotateResidual` does; QatError where it has none."""
    stream = family_of(model).stream(model)
    if stream is None:
        raise QatError(f"{type(model).__name__} has no residual stream that only LayerNorms read")
    rotate_stream(model, stream, seed)


@torch.no_grad()
def rotate_stream(model: nn.Module, stream: Stream, seed: int) -> None:
    """Rotate a stream, in float64; before weights and activations are calibrated."""
    norm: Any
    layer: Any
    first: Any = model.get_submodule(stream.norms[0][0])
    Q = rotation(len(first.weight), seed).to(first.weight.device)
    QC = Q - Q.mean(1, keepdim=True)
    for name in stream.parameters:
        value = model.get_parameter(name)
        value.copy_(value.double() @ QC.T)
    for name in stream.writers:
        layer, M = model.get_submodule(name), QC
        if name in stream.scales:
            M = QC * model.get_parameter(stream.scales[name]).double()
            model.get_parameter(stream.scales[name]).fill_(1)
        layer.weight.copy_((M @ layer.weight.double().flatten(1)).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(M @ layer.bias.double())
    for name, readers in stream.norms:
        norm = model.get_submodule(name)
        for layer in map(model.get_submodule, readers):
            weight = layer.weight.double()
            if layer.bias is None:
                raise QatError(f"a reader of {name!r} has no bias, which would take the shift of the norm")
            layer.bias.copy_(layer.bias.double() + weight @ norm.bias.double())
            layer.weight.copy_(weight * norm.weight.double() @ Q.T)
        norm.weight.fill_(1)
        norm.bias.zero_()


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix Q (size, size) with Q 1 = 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1
    U, _ = torch.linalg.qr(basis)  # its first column is that of ones, over its length
    V, R = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64))
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = V * R.diagonal().sign()  # uniform among all rotations
    found: Tensor = U @ inner @ U.T
    return found
