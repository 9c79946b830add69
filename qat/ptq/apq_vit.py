"""APQ-ViT (Ding et al., ACM MM 2022, arXiv 2303.14341) in our reading: its authors have released no code.

Steps are chosen by an error at the output of a whole block, so that a step sees what the layers around it make of its
error. With O the output of the block in floating point, from the same input, and g the gradient of the loss there,
candidates for an operand are compared by the mean of

    M * (g * (Oq - O))^2

where M is 0 for the smallest errors |g * (Oq - O)| of every image and 1 for the others (bottom elimination). While
an operand is tried, the products before its own are quantized and those after it are not. The softmax has a uniform
quantizer whose largest value is hardly clipped, because large attention matters (Matthew effect). The share of errors
that is dropped, and how little is clipped, are not in what is published. Shapes: B images, n values of an image, G
groups that share a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.full_range import FullRange, full_ranges
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.output_gradients import output_gradients
from qat.ptq.search import Ranges
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Preset, options_of
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Prefix, Work
from qat.quantizers import Quantizer
from qat.ranges import Range, check_fields
from qat.sites.insert import switched_off


@dataclass
class BlockSearchOptions:
    """How the output of a block is compared.

    Args:
        coarse: multiples of the full range that are tried first, from ``alpha`` to ``beta``, beside the range itself.
        fine: multiples that are tried around the best of them.
        alpha: the least multiple.
        beta: the largest multiple.
        softmax: the least multiple of the range of a probability.
        rounds: how often both operands of a product are chosen, the weight first.
        images: on which candidates are compared, at most.
        dropped: share of the errors of each image, the smallest, that does not count.
    """

    coarse: Annotated[int, Range(2, 1000)] = 10
    fine: Annotated[int, Range(0, 1000)] = 10
    alpha: Annotated[float, Range(above=0, high=1)] = 0.01
    beta: Annotated[float, Range(1, 100)] = 1.2
    softmax: Annotated[float, Range(above=0, high=1)] = 0.8
    rounds: Annotated[int, Range(1, 1000)] = 1
    images: Annotated[int, Range(1, 1_000_000_000)] = 16
    dropped: Annotated[float, Range(0, below=1)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if self.alpha >= self.beta:
            raise QatError(f"{type(self).__name__}: alpha is {self.alpha}: give less than beta, {self.beta}")


@dataclass
class BlockSearch(BlockSearchOptions, Step):
    """Fills any recipe; what no product reads keeps its start. Groups of one operand are scaled by the same factor."""

    stage = Stage.SEARCH
    needs_logits = True

    def begin(self, work: Work) -> None:
        """Forget what an earlier call has kept."""
        self._done: set[str] = set()  # sites that have been chosen so far
        self._ranges: dict[str, Ranges] = {}  # of the present unit, by site

    def unit(self, here: UnitWork) -> None:
        """Compute what a unit gives in floating point, and the gradient there, once."""
        x = torch.cat(tuple(here.inputs))[: self.images]
        if not here.products:
            return
        gradient = output_gradients(here, x, torch.cat(here.work.logits)[: self.images]).unit
        with switched_off(here.off):
            output = here.unit.run(x)
        self._ranges = full_ranges(here)
        self._error = BlockError(here.unit.run, x, output, gradient, self.dropped)

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Choose both operands of a product, with those after it switched off.

        The second one is off too until its first turn: from its full range, it would hide what the first one does.
        """
        names = (product.right, product.left) if product.matrices.weight is not None else (product.left, product.right)
        for _ in range(self.rounds):
            for name in names:
                self._done.add(name)
                with switched_off(q for other, q in here.work.wanted.items() if other not in self._done):
                    self._choose_(here, name)

    def _choose_(self, here: UnitWork, name: str) -> None:
        """Give an operand the candidate with the least error, the first of equal ones."""
        if name not in self._ranges:
            return  # in floating point, calibrated already, or with parameters that follow no range
        quantizer, (low, high) = here.work.wanted[name], self._ranges[name]
        least = max(self.alpha, self.softmax) if name.endswith("probs_quant") else self.alpha
        factors = torch.cat([torch.ones(1), torch.linspace(least, self.beta, self.coarse)])
        errors = [self._tried(quantizer, factor * low, factor * high) for factor in factors]
        spacing, best = factors[2] - factors[1], factors[int(torch.tensor(errors).argmin())]
        finer = torch.linspace(-1, 1, self.fine + 2)[1:-1] * spacing + best
        finer = finer[(finer >= least) & (finer <= self.beta)]
        errors += [self._tried(quantizer, factor * low, factor * high) for factor in finer]
        factor = torch.cat([factors, finer])[int(torch.tensor(errors).argmin())]
        quantizer.set_range_(factor * low, factor * high)

    def _tried(self, quantizer: Quantizer, low: Tensor, high: Tensor) -> float:
        quantizer.set_range_(low, high)
        return self._error()


class BlockError:
    """The error of a unit as it is quantized now.

    Args:
        run: the unit.
        x: its input (B, ...).
        output: O, what it gives in floating point.
        gradient: g, of the loss there.
        dropped: the share of the errors of each image that does not count.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], x: Tensor, output: Tensor, gradient: Tensor, dropped: float
    ) -> None:
        self.run, self.x, self.output, self.gradient, self.dropped = run, x, output, gradient, dropped

    @torch.no_grad()
    def __call__(self) -> float:
        """Run the unit."""
        errors = self.gradient * (self.run(self.x) - self.output)
        return top_mean(errors.flatten(1).square(), self.dropped)


def top_mean(squares: Tensor, dropped: float) -> float:
    """The mean of squares (B, n) after the smallest of each image, a share of ``dropped``, are replaced by 0."""
    kept = squares.shape[1] - int(dropped * squares.shape[1])
    return float(squares.topk(kept, dim=1, sorted=False).values.double().sum()) / squares.numel()


@dataclass
class APQViT(BlockSearchOptions, Preset):
    """APQ-ViT in our reading, for its recipe apq_vit and any other one whose parameters follow from ranges.

    Args:
        prefix: what units see: the output of the units before them as they are ``quantized``, or as ``float``.
    """

    prefix: Prefix = "quantized"

    changes_weights = False

    def steps(self) -> Sequence[Step]:
        """The full range, then the search."""
        return [FullRange(), BlockSearch(**options_of(self, BlockSearchOptions))]
