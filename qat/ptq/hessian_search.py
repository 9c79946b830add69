"""The search of PTQ4ViT (Yuan et al., ECCV 2022, arXiv 2111.12293) for the steps of both operands of every product.

Candidates for the step of an operand are multiples of the one that covers its whole range, from ``alpha`` to ``beta``.
The score of one is the squared error of the output of its product, weighted by squared gradients of the loss
(`gradient_product`), which are those of a quantized unit (`output_gradients`). Weight and input of a layer take turns,
the weight first; of a product of activations, the left one first. After softmax every split is tried while the values
stay in floating point. Shapes: K candidates, G groups that share a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated

import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.full_range import follows_range, full_ranges
from qat.ptq.gradient_product import GradientProduct, Side
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.output_gradients import output_gradients
from qat.ptq.product_search import Operand
from qat.ptq.search import Ranges
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork, Visits
from qat.ptq.work import SAMPLES, Work, drawn
from qat.quantizers import Quantizer
from qat.quantizers.space import Table
from qat.ranges import Range, check_fields


@dataclass
class HessianSearchOptions:
    """What is tried, and on how much.

    Args:
        candidates: how many steps are tried for each operand.
        alpha: the first of them, as a part of the step that covers the whole range.
        beta: they end before this part.
        rounds: how often both operands of a product are chosen, at most.
        rows: rows of the output of a product on which candidates are compared, the class token of every image among
            them: 6,304 are those of 32 images of 224 pixels, cut into patches of 16.
    """

    candidates: Annotated[int, Range(2, 100_000)] = 100
    alpha: Annotated[float, Range(above=0, high=1)] = 0.01
    beta: Annotated[float, Range(above=0, high=100)] = 1.2
    rounds: Annotated[int, Range(1, 1000)] = 3
    rows: Annotated[int, Range(1, 1_000_000_000)] = 6304

    def __post_init__(self) -> None:
        check_fields(self)
        if self.alpha >= self.beta:
            raise QatError(f"{type(self).__name__}: alpha is {self.alpha}: give less than beta, {self.beta}")


@dataclass
class HessianSearch(HessianSearchOptions, Step):
    """Fills any recipe; a quantizer for which nothing can be tried, and what no product reads, keep their start."""

    stage = Stage.SEARCH
    needs_logits = True

    def begin(self, work: Work) -> None:
        """Forget what an earlier call has kept."""
        self._ranges: dict[str, Ranges] = {}  # of the present unit, by site
        self._gradients: list[Visits] = []  # at the outputs of its products, for every batch

    def unit(self, here: UnitWork) -> None:
        """Compute the gradients at the outputs of all products of a unit, once."""
        self._ranges = full_ranges(here)
        pairs = zip(here.inputs, here.work.logits, strict=True)
        self._gradients = [output_gradients(here, x, target).products for x, target in pairs] if here.products else []

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Choose both operands of a product."""
        found = self._samples(here, product)
        if not found:
            return  # there are few rows, and none of them has a gradient
        *tensors, gradients = found
        weight = product.matrices.weight
        if weight is not None:
            tensors.append([weight.detach().float()] * len(gradients))
        left, right = (self._side(here, product, index, x) for index, x in enumerate(tensors))
        largest = max(float(g.abs().max()) for g in gradients)  # squares of small gradients would be zero in float32
        GradientProduct(left, right, [g / largest for g in gradients], weight is not None).search_(self.rounds)

    def _samples(self, here: UnitWork, product: MatrixProduct) -> list[list[Tensor]]:
        """The activations and the gradients of a product, samples first: a tensor of each for every shape.

        What has no gradient at all is left out: after the last attention, only the class token has one.
        """
        kept: dict[tuple[torch.Size, ...], list[list[Tensor]]] = {}
        for seen, gradients in zip(here.watched(product.activations, quantized=True), self._gradients, strict=True):
            visits = [*(seen[name] for name in product.activations), gradients[product.left]]
            for tensors in zip(*visits, strict=True):
                parts = self._drawn(product, [x.float() for x in tensors], len(here.inputs))
                alive = parts[-1].flatten(1).any(1)
                kept.setdefault(tuple(x.shape[1:] for x in parts), []).append([x[alive] for x in parts])
        joined = [[torch.cat(same) for same in zip(*parts, strict=True)] for parts in kept.values()]
        return [list(tensors) for tensors in zip(*(parts for parts in joined if len(parts[-1])), strict=True)]

    def _drawn(self, product: MatrixProduct, tensors: list[Tensor], batches: int) -> list[Tensor]:
        """The part of one batch that is compared, the same of the activations and of their gradient, which is last."""
        matrices, wanted = product.matrices, ceil(self.rows / batches)
        if matrices.weight is not None and tensors[0].ndim == 3:  # images of tokens: the class token comes first
            return [matrices.samples(drawn(x, ceil(wanted / len(x)), axis=1, first=1)) for x in tensors]
        tensors = [matrices.samples(x) for x in tensors]
        count = ceil(wanted / matrices.rows_of(tensors[0]))
        return [drawn(x, count) for x in tensors]

    def _side(self, here: UnitWork, product: MatrixProduct, index: int, tensors: list[Tensor]) -> Side:
        """The left (0) or the right (1) operand of a product."""
        name, matrices = (product.left, product.right)[index], product.matrices
        operand = Operand(
            here.model.get_submodule(name), tensors, (matrices.left, matrices.right)[index], matrices.axes[index]
        )
        if name not in here.work.wanted:
            return Side(operand)
        quantizer = here.work.wanted[name]
        rows = torch.cat([quantizer.grouped(x) for x in tensors], dim=1)
        space = quantizer.search_space(drawn(rows, SAMPLES, axis=1))
        if space is not None:  # a split after softmax is chosen alone
            return Side(operand, space.parameters(space.first), alone=matrices.weight is None)
        if not follows_range(quantizer):
            return Side(operand)
        return Side(operand, multiples(quantizer, *self._ranges[name], self.candidates, self.alpha, self.beta))


def multiples(quantizer: Quantizer, low: Tensor, high: Tensor, count: int, alpha: float, beta: float) -> Table:
    """Parameters (K, G) for the multiples ``alpha + i * (beta - alpha) / count`` of a range (G,), i from 0.

    The last, ``beta``, is left out, as released.
    """
    parts = torch.arange(count, device=low.device)[:, None] / count
    factors = alpha + (beta - alpha) * parts
    return quantizer.from_range(factors * low, factors * high)
