"""Parameters with the least error of every matrix product: the calibration of AdaLog, APHQ-ViT and FIMA-Q.

While points for one operand are tried, the other one stays as it is quantized; they take turns. Both operands are what
the quantized model makes of the images up to this product, and the target is the product of the same two tensors before
they are quantized. The three papers use operands of the float model, with which DeiT-Tiny loses five points at 4 bits.
If the target were the product in the float model and the operands those of the quantized one, everything would shrink
towards zero at 3 bits, as regression on noisy inputs does. Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Annotated

import torch
from torch import Tensor

from qat.ptq.fpcs import space_of
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.product_search import Operand, ProductSearch
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import SAMPLES, drawn, with_ends
from qat.ranges import Range, check_fields

IMAGE_BITS = 8  # of the images that a convolution reads; with these, every pixel is exact


@dataclass
class OutputSearch(Step):
    """Fills any recipe; a quantizer for which nothing can be tried keeps what it started from.

    Args:
        rounds: how often both operands of a product are improved, at most.
        rows: rows of the output of a product on which candidates are compared, the class token of every image among
            them: 6,304 are those of 32 images of 224 pixels, cut into patches of 16.
        levels: refinements of the first 128 candidates, each around the best 4.
    """

    rounds: Annotated[int, Range(1, 1000)] = 3
    rows: Annotated[int, Range(1, 1_000_000_000)] = 6304
    levels: Annotated[int, Range(0, 20)] = 5

    stage = Stage.SEARCH

    def __post_init__(self) -> None:
        check_fields(self)

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Improve both operands of a product."""
        found, roots = self.operands(here, product)
        seen = product.matrices
        left = self._operand(here, product.left, found[product.left], seen.left, seen.axes[0])
        left.roots = roots
        if seen.weight is not None and seen.weight.ndim > 2 and here.work.width(product.left) >= IMAGE_BITS:
            left.space = None  # cutting images into patches for every candidate would take a minute, for nothing
        x = found[product.right] if seen.weight is None else [seen.weight.detach().float()]
        right = self._operand(here, product.right, x, seen.right, seen.axes[1])
        if left.space is not None or right.space is not None:
            ProductSearch(left, right, self.levels).search_(self.rounds)

    def _operand(
        self, here: UnitWork, name: str, tensors: list[Tensor], matrix: Callable[[Tensor], Tensor], axis: int | None
    ) -> Operand:
        """One side of a product, with what is tried where its site is to be calibrated."""
        operand = Operand(here.model.get_submodule(name), tensors, matrix, axis)
        if name in here.work.wanted:
            quantizer = here.work.wanted[name]
            rows = torch.cat([quantizer.grouped(x) for x in tensors], dim=1)
            operand.space = space_of(quantizer, with_ends(rows, SAMPLES))
        return operand

    def operands(self, here: UnitWork, product: MatrixProduct) -> tuple[dict[str, list[Tensor]], list[Tensor] | None]:
        """Samples of the activations of a product, and the roots of what the rows of the left one count.

        There is one tensor for each shape, because groups of tokens may differ.
        """
        kept: dict[str, list[Tensor]] = {name: [] for name in product.activations}
        layer, roots = here.layer(product), list[Tensor]()
        counts = None if layer is None else layer.counts()
        wanted = ceil(self.rows / len(here.inputs))
        for i, seen in enumerate(here.watched(kept, quantized=True)):
            for name, tensors in seen.items():
                kept[name] += [samples(product, x.float(), wanted) for x in tensors]
            if counts is not None:
                pairs = zip(counts[i], seen[product.left], strict=True)
                roots += [samples_of_counts(product, count, x, wanted).sqrt() for count, x in pairs]
        found = {name: _by_shape(tensors) for name, tensors in kept.items()}
        return found, None if counts is None else _by_shape(roots)


def samples(product: MatrixProduct, x: Tensor, rows: int) -> Tensor:
    """As many samples of one batch of an operand as give the rows that are wanted; the class token is among them."""
    matrices = product.matrices
    if matrices.weight is not None and x.ndim == 3:  # images of tokens: the class token comes first
        return matrices.samples(drawn(x, ceil(rows / len(x)), axis=1, first=1)).clone()
    x = matrices.samples(x)
    return drawn(x, ceil(rows / matrices.rows_of(x))).clone()


def samples_of_counts(product: MatrixProduct, counts: Tensor, x: Tensor, rows: int) -> Tensor:
    """The counts (n, 1) of the rows of the same samples, from those of all rows (B, n / B)."""
    each = product.matrices.rows_of(product.matrices.samples(x))
    if each > 1:  # a sample is an image
        return drawn(counts, ceil(rows / each)).reshape(-1, 1)
    if x.ndim == 3:
        return drawn(counts, ceil(rows / len(x)), axis=1, first=1).reshape(-1, 1)
    return drawn(counts.reshape(-1, 1), rows)


def _by_shape(kept: list[Tensor]) -> list[Tensor]:
    shapes = dict.fromkeys(x.shape[1:] for x in kept)
    return [torch.cat([x for x in kept if x.shape[1:] == shape]) for shape in shapes]
