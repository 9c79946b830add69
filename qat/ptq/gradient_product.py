"""Parameters of the two operands of a matrix product by the Hessian-guided metric of PTQ4ViT (arXiv 2111.12293).

The product is Z = X M^T, per matrix of a batch, with the target Y before either operand is quantized, and g is the
gradient of the loss at Z. The score of parameters for X is the mean of

    (g * (q(X) q(M)^T - Y))^2

over all elements, with M as it is quantized now. The square of g stands for the diagonal of the Hessian. There is no
short form of this sum as there is without g, because g weights every element on its own; so products are computed, in
blocks that stay in the cache, and the first decision is made on the samples with the largest gradients.
Shapes: K candidates, n rows of X, m rows of M, I columns of both, G groups that share a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from qat.ptq.product_search import Operand, by_group, tried_values
from qat.ptq.search import BLOCK, OTHER_BLOCK
from qat.quantizers import Quantizer
from qat.quantizers.space import Table

QUICK = 8  # the first decision is made on one of eight samples
FINALISTS = 8  # candidates between which all samples decide
TOGETHER = 8  # candidates of a block


@dataclass
class Side:
    """One operand and what is tried for it.

    Args:
        operand: its site, the tensors that reach it, and how they are seen as matrices.
        table: candidates (K, G) for the parameters of its site, by name; None where nothing is tried.
        alone: the other operand stays in floating point while they are tried.
    """

    operand: Operand
    table: Table | None = None
    alone: bool = False

    def values(self, exact: bool) -> list[Tensor]:
        """The matrices (..., n, I) of each tensor, as they are or quantized."""
        return [self.operand.matrix(x if exact else self.operand.site(x)) for x in self.operand.tensors]


class GradientProduct:
    """A product with the gradients at its output.

    Args:
        left, right: X and M, with as many tensors each.
        gradients: g for each tensor, with its samples along the first axis: (samples, ..., n, m), or (samples, m) where
            a sample is one row.
        weight: the right operand is a weight, which is the same for all samples.
    """

    def __init__(self, left: Side, right: Side, gradients: Sequence[Tensor], weight: bool) -> None:
        self.left, self.right, self.gradients, self.weight = left, right, gradients, weight
        pairs = zip(left.values(exact=True), right.values(exact=True), strict=True)
        self.targets = [x @ m.mT for x, m in pairs]  # Y (..., n, m)
        self.weights = [g.flatten(0, -2) if weight else g for g in gradients]  # the shape of Y

    @torch.no_grad()
    def search_(self, rounds: int) -> None:
        """Choose one operand after the other, a weight or else the left one first, until nothing changes."""
        order, quick = ((True, False) if self.weight else (False, True)), self._quick()
        for turn in range(rounds):
            for right in order:
                changed = self._choose_(right, quick)
                if not changed and (turn or right == order[-1]):  # the other one would be compared with the same again
                    return

    @torch.no_grad()
    def scores(self, right: bool, table: Table) -> Tensor:
        """Scores (K, G) of candidates (K, G) for one operand, or (K, 1) where rows mix groups.

        Args:
            right: the right operand, otherwise the left one.
            table: candidates for the parameters of its site.
        """
        side = self.right if right else self.left
        quantizer, blocks = cast(Quantizer, side.operand.site), list(self._blocks(right))
        found = [_sums(side.operand, quantizer, blocks, part) for part in _parts(table)]
        return torch.cat(found) / sum(target.numel() for target in self.targets)

    def _choose_(self, right: bool, quick: GradientProduct | None) -> bool:
        """Give one operand the candidates with the least score, the first of equal ones; whether it has changed."""
        side = self.right if right else self.left
        table, quantizer = side.table, cast(Quantizer, side.operand.site)
        if table is None:
            return False
        if quick is not None and _count(table) > FINALISTS:
            least = _finite(quick.scores(right, table)).topk(FINALISTS, dim=0, largest=False).indices
            table = _rows(table, least.sort(dim=0).values)
        best = _rows(table, _finite(self.scores(right, table)).argmin(0, keepdim=True))
        before = {name: getattr(quantizer, name).detach().clone() for name in best}
        quantizer.set_({name: values[0] for name, values in best.items()})
        return any(not torch.equal(getattr(quantizer, name), values) for name, values in before.items())

    def _quick(self) -> GradientProduct | None:
        """The same product on the samples with the largest gradients; None where there are few."""
        if min(len(g) for g in self.gradients) < 2 * QUICK:
            return None
        energies = [g.flatten(1).square().sum(1) for g in self.gradients]
        picks = [energy.topk(len(energy) // QUICK).indices.sort().values for energy in energies]
        left = _picked(self.left, picks)
        right = self.right if self.weight else _picked(self.right, picks)
        gradients = [g[pick] for g, pick in zip(self.gradients, picks, strict=True)]
        return GradientProduct(left, right, gradients, self.weight)

    def _blocks(self, right: bool) -> Iterator[Block]:
        """The product in parts, each as that of the operand that is tried and the other one."""
        side, other = (self.right, self.left) if right else (self.left, self.right)
        others = other.values(exact=side.alone)
        for x, m, y, g in zip(side.operand.tensors, others, self.targets, self.weights, strict=True):
            size = max(1, BLOCK.get(y.device.type, OTHER_BLOCK) // (TOGETHER * max(y[0].numel(), m[0].numel())))
            if not self.weight:
                parts = zip(x.split(size), m.split(size), y.split(size), g.split(size), strict=True)
            elif right:
                rows = m.split(size)
                parts = zip([x] * len(rows), rows, y.split(size), g.split(size), strict=True)
            else:
                each = len(y) // len(x)  # rows that a sample gives: the places of a convolution
                xs, rows = x.split(max(1, size // each)), max(1, size // each) * each
                parts = zip(xs, [m] * len(xs), y.split(rows), g.split(rows), strict=True)
            for block in parts:
                yield Block(*block[:2], *(t.mT.contiguous() if right else t for t in block[2:]))


class Block(NamedTuple):
    """A part of a product: X, not yet a matrix, with q(M) (..., m, I), Y and g (..., n, m)."""

    x: Tensor
    other: Tensor
    target: Tensor
    gradient: Tensor


def _sums(operand: Operand, quantizer: Quantizer, blocks: Sequence[Block], table: Table) -> Tensor:
    """The sum of the squared errors (K, G), float64, over all blocks."""
    total, x = torch.zeros((), dtype=torch.float64, device=blocks[0].target.device), None
    for block in blocks:
        if block.x is not x:  # a weight is the same in all of them
            x, values = block.x, operand.matrix(tried_values(quantizer, block.x, table))
        total = total + by_group(_errors(values, block), quantizer.layout, operand.axis)
    return total


def _errors(values: Tensor, block: Block) -> Tensor:
    """The squared errors of every row, (K, ..., n), of values (K, ..., n, I)."""
    values = values.movedim(0, -3)  # (..., K, n, I): K * n rows for every M
    errors = (values.flatten(-3, -2) @ block.other.mT).unflatten(-2, values.shape[-3:-1])  # (..., K, n, m)
    errors.sub_(block.target.unsqueeze(-3)).mul_(block.gradient.unsqueeze(-3))
    norms: Tensor = torch.linalg.vector_norm(errors, dim=-1)
    return norms.double().square_().movedim(-2, 0)


def _parts(table: Table) -> Iterator[Table]:
    for k in range(0, _count(table), TOGETHER):
        yield {name: values[k : k + TOGETHER] for name, values in table.items()}


def _count(table: Table) -> int:
    return len(next(iter(table.values())))


def _rows(table: Table, picks: Tensor) -> Table:
    """The candidates with the indices (k, G), or (k, 1) for all groups."""
    return {name: values.gather(0, picks.expand(-1, values.shape[1])) for name, values in table.items()}


def _finite(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=torch.inf)


def _picked(side: Side, picks: Sequence[Tensor]) -> Side:
    """The same operand for some of the samples."""
    tensors = [x[pick] for x, pick in zip(side.operand.tensors, picks, strict=True)]
    return Side(replace(side.operand, tensors=tensors), side.table, side.alone)
