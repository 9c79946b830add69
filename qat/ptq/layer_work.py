"""A linear layer whose weight a calibration corrects, and the moments of what reaches it.

The moments are summed over all images once, when the first step asks for them, and hold all that corrections of weight
and bias need. Shapes: I inputs and O outputs of the layer (a convolution reads patches), n rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.moments import Moments
from qat.quantizers import Quantizer

TINY = 1e-30


class Surroundings(Protocol):
    """What a layer has to know of the unit that it is in."""

    model: nn.Module
    inputs: Sequence[Tensor]
    visits: Counter[str]
    work: Any

    def watched(self, names: Iterable[str], quantized: bool) -> Iterator[dict[str, list[Tensor]]]:
        """For each batch, what reaches the named sites."""

    def float_watched(self, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
        """The same in the float model."""


class LayerWork:
    """The work on one layer.

    Args:
        name: of the layer.
        layer: has ``weight``, ``bias`` and ``weight_quant``.
        product: that of its input and its weight.
        here: the unit that it is in.
    """

    def __init__(self, name: str, layer: Any, product: MatrixProduct, here: Surroundings) -> None:
        self.name, self.layer, self.product, self.here = name, layer, product, here
        self.site = here.model.get_submodule(product.left)
        self.quantizer: Quantizer = layer.weight_quant

    def counts(self) -> list[list[Tensor]] | None:
        """How much the rows of the output count, for every batch and visit (B, n / B); None where all count alike.

        Their mean is 1: a share of it is the importance of the row, the rest is the same for all.
        """
        share = self.here.work.importance_share
        if not share:
            return None
        found = self.here.work.importance[self.name]
        mean = torch.cat([x.flatten() for visits in found for x in visits]).mean().clamp(min=TINY)
        return [[1 - share + share * x / mean for x in visits] for visits in found]

    @property
    def weight(self) -> Tensor:
        """The present weight as a matrix (O, I)."""
        matrix: Tensor = self.product.matrices.right(self.layer.weight.detach().float())
        return matrix

    @torch.no_grad()
    def set_weight_(self, weight: Tensor) -> None:
        """Give the layer a weight (O, I)."""
        self.layer.weight.copy_(weight.view_as(self.layer.weight))

    @torch.no_grad()
    def add_bias_(self, change: Tensor) -> None:
        """Add to the bias (O,); a layer without one stays as it is."""
        if self.layer.bias is not None:
            self.layer.bias.add_(change.to(self.layer.bias))

    @cached_property
    def halves(self) -> tuple[Moments, Moments]:
        """Moments of two halves of the images: of the quantized input, with itself before it is quantized beside it."""
        found, name = (self._empty(), self._empty()), self.product.left
        first, watched = 0, self.here.watched([name], quantized=True)
        for batch, seen, counts in zip(self.here.inputs, watched, self._counts(), strict=True):
            for x, count in zip(seen[name], counts, strict=True):
                image = first + torch.arange(len(x), device=x.device) // max(1, len(x) // len(batch))  # it may be cut
                for k, half in enumerate(found):
                    mine = image % 2 == k
                    half.update(*self._rows(x[mine]), weights=None if count is None else count[mine].flatten())
            first += len(batch)
        self._check(found[0])
        return found

    @cached_property
    def moments(self) -> Moments:
        """Of all images."""
        return self.halves[0] + self.halves[1]

    @cached_property
    def float_moments(self) -> Moments:
        """Of all images, with the input in the float model beside the quantized one."""
        found, name = self._empty(), self.product.left
        seen, floats = self.here.watched([name], quantized=True), self.here.float_watched([name])
        for visits, references, counts in zip(seen, floats, self._counts(), strict=True):
            for x, reference, count in zip(visits[name], references[name], counts, strict=True):
                rows, weights = self._rows(x)[0], None if count is None else count.flatten()
                found.update(rows, self._rows(reference)[1], weights)
        self._check(found)
        return found

    def _counts(self) -> Sequence[Sequence[Tensor | None]]:
        visits = self.here.visits[self.product.left]
        return self.counts() or [[None] * visits for _ in self.here.inputs]

    def _empty(self) -> Moments:
        return Moments(self.weight.shape[1], self.weight.device)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What reaches the site as the layer sees it, quantized and not, each (n, I)."""
        samples, matrix = self.product.matrices.samples, self.product.matrices.left
        with torch.no_grad():
            return matrix(samples(self.site(x)).float()), matrix(samples(x).float())

    def _check(self, sums: Moments) -> None:
        if not sums.rows:
            raise QatError(f"no calibration image reached {self.name!r}: raise calibration.images")
