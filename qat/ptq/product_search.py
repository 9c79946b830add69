"""Parameters of the two operands of a matrix product that leave the least error in its output.

The product is Z = X M^T, per matrix of a batch. While points for X are tried, M stays as it is quantized now, q(M),
and the target Y is the product before either is quantized. With D = q(X) - X and R = X q(M)^T - Y, the error of every
row is

    |D q(M)^T + R|^2   =   (D G + 2 L) * D summed,  + |R|^2,        G = q(M)^T q(M),   L = R q(M)

The form that takes less work is used: the second needs M only once, for any number of points. Neither takes a
difference of large numbers, because D and R are deviations.
Shapes: K points, n rows of X, O rows of M, I columns of both, G groups that share a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qat.ptq.fpcs import LEVELS, Errors, best_parameters
from qat.ptq.search import BLOCK, OTHER_BLOCK
from qat.quantizers import Layout, Quantizer
from qat.quantizers.space import Space, Table

NEXT = 2  # refinements in the second round and later, which look around the best points of the round before
QUICK = 17  # the first decisions are made on every sixteenth row of a layer's input, and on a quarter as few matrices

Map = Callable[[Tensor], Tensor]


@dataclass
class Operand:
    """One side of a product.

    Args:
        site: what quantizes it, or a `FloatSite`.
        tensors: what reaches the site; more than one where its matrices differ in shape.
        matrix: from the shape of such a tensor, perhaps with axes before its own, to (..., n, I).
        axis: the axis of a tensor whose slices have different rows; None where every slice has a part of every row.
        space: what is tried for the parameters of the site; None where nothing is.
        points: the best ones of an earlier search, around which the next one looks.
        roots: for each tensor, the square root of how much each row counts (n, 1); None where all rows count alike.
    """

    site: nn.Module
    tensors: Sequence[Tensor]
    matrix: Map
    axis: int | None
    space: Space | None = None
    points: Table | None = None
    roots: Sequence[Tensor] | None = None

    def seen(self, i: int, x: Tensor) -> Tensor:
        """A tensor of the shape of the i-th one as a matrix (..., n, I), its rows scaled by their roots."""
        return self.matrix(x) if self.roots is None else self.matrix(x) * self.roots[i]

    def matrices(self) -> list[Tensor]:
        """X, (..., n, I), of each tensor."""
        return [self.seen(i, x) for i, x in enumerate(self.tensors)]

    def values(self) -> list[Tensor]:
        """q(X), (..., n, I), of each tensor."""
        return [self.seen(i, self.site(x)) for i, x in enumerate(self.tensors)]

    def part(self, stride: int, rows: int) -> Operand:
        """Every ``stride``-th sample of the tensors, each of which gives a number of rows."""
        roots = self.roots and [x.unflatten(0, (-1, rows))[::stride].flatten(0, 1) for x in self.roots]
        return Operand(self.site, [x[::stride] for x in self.tensors], self.matrix, self.axis, roots=roots)


@dataclass
class ProductSearch:
    """A product; its target Y (..., n, O) is the product of the operands before they are quantized.

    Args:
        left, right: X and M, with as many tensors each.
        levels: refinements of the grid of points.
    """

    left: Operand
    right: Operand
    levels: int = LEVELS

    def __post_init__(self) -> None:
        pairs = zip(self.left.matrices(), self.right.matrices(), strict=True)
        self.targets = [x @ m.mT for x, m in pairs]

    @torch.no_grad()
    def error(self) -> float:
        """The mean square of the error of the output."""
        products = zip(self.left.values(), self.right.values(), self.targets, strict=True)
        sums = [float((x @ m.mT - target).square_().mean()) * target.numel() for x, m, target in products]
        return sum(sums) / sum(target.numel() for target in self.targets)

    @torch.no_grad()
    def search_(self, rounds: int) -> None:
        """Improve one operand after the other, until nothing changes; the error of the product never grows."""
        best, kept = self.error(), self._parameters()
        for turn in range(rounds):
            levels = min(self.levels, NEXT) if turn else self.levels
            improve_(self.right, self.left.values(), [target.mT for target in self.targets], levels)
            changed = improve_(self.left, self.right.values(), self.targets, levels)
            error = self.error()
            if not error < best:
                self._restore(kept)
                return
            best, kept = error, self._parameters()
            if not changed:  # the right operand would be compared with the same left one again
                return

    def _parameters(self) -> list[Tensor]:
        return [tensor.clone() for site in (self.left.site, self.right.site) for tensor in _tensors(site)]

    def _restore(self, kept: list[Tensor]) -> None:
        now = [tensor for site in (self.left.site, self.right.site) for tensor in _tensors(site)]
        for tensor, value in zip(now, kept, strict=True):
            tensor.copy_(value)


def _tensors(site: nn.Module) -> list[Tensor]:
    return [*site.parameters(), *site.buffers()]


@torch.no_grad()
def improve_(operand: Operand, others: Sequence[Tensor], targets: Sequence[Tensor], levels: int = LEVELS) -> bool:
    """Give every group the point with the least error, where that is less than its present error.

    Groups whose errors cannot be told apart (a row sums over the channels of an input) take the same point.

    Args:
        operand: X.
        others: q(M), (..., O, I), for each tensor of the operand.
        targets: Y, (..., n, O), for each tensor.
        levels: refinements of the grid of points.

    Returns:
        Whether any group has changed.
    """
    if operand.space is None:
        return False
    quantizer = cast(Quantizer, operand.site)
    errors = OperandErrors(operand, others, targets)
    row, least, operand.points = best_parameters(operand.space, errors, errors.quick(), levels, operand.points)
    better = least < errors({name: getattr(quantizer, name).detach()[None] for name in row})[0]
    quantizer.set_({name: torch.where(better, values, getattr(quantizer, name)) for name, values in row.items()})
    return bool(better.any())


class OperandErrors:
    """The errors (K, G) of a product, from parameters (K, G) of one operand; arguments as those of `improve_`."""

    def __init__(self, operand: Operand, others: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.operand, self.others, self.targets = operand, others, targets
        self.quantizer = cast(Quantizer, operand.site)
        self.matrices = operand.matrices()
        self.maps = [row_errors(*parts) for parts in zip(self.matrices, others, targets, strict=True)]

    def __call__(self, table: Table) -> Tensor:
        """Errors of every row of a table."""
        device, largest = self.matrices[0].device, max(x.numel() for x in self.operand.tensors)
        together = max(1, BLOCK.get(device.type, OTHER_BLOCK) // largest)
        return torch.cat([self._errors(part) for part in blocks_of(table, together)])

    def _errors(self, table: Table) -> Tensor:
        operand, found = self.operand, []
        for i, (x, X, error_map) in enumerate(zip(operand.tensors, self.matrices, self.maps, strict=True)):
            D = operand.seen(i, tried_values(self.quantizer, x, table)) - X
            found.append(by_group(error_map(D), self.quantizer.layout, operand.axis))
        return sum(found[1:], found[0])

    def quick(self) -> Errors | None:
        """A cheaper estimate, for the first decisions: on a part of the rows, or of the matrices.

        None where that saves little.
        """
        x = self.operand.tensors[0]
        if not self.quantizer.layout.batched:
            return None  # a weight's errors take a product with G, whose size does not depend on the number of rows
        rows = max(1, len(self.targets[0]) // len(x)) if self.targets[0].ndim == 2 else 1  # that a sample gives
        stride = min(QUICK if rows == 1 and self.targets[0].ndim == 2 else QUICK // 4, len(x) // 2)
        if stride < 2:
            return None
        part = self.operand.part(stride, rows)
        if self.targets[0].ndim > 2:
            return OperandErrors(part, [m[::stride] for m in self.others], [y[::stride] for y in self.targets])
        targets = [y.unflatten(0, (-1, rows))[::stride].flatten(0, 1) for y in self.targets]
        return OperandErrors(part, self.others, targets)


def blocks_of(table: Table, together: int) -> Iterator[Table]:
    """The rows of a table, some at a time."""
    for k in range(0, len(next(iter(table.values()))), together):
        yield {name: rows[k : k + together] for name, rows in table.items()}


def row_errors(X: Tensor, M: Tensor, Y: Tensor) -> Map:
    """A function of deviations D (K, ..., n, I) of X (..., n, I): the squared error of every row, (K, ..., n).

    Args:
        X: the operand without error.
        M: the other operand, (..., O, I).
        Y: the target of the product, (..., n, O).
    """
    R = X @ M.mT - Y
    gram = M.shape[-2] > M.shape[-1]
    G, L, rest = (M.mT @ M, 2 * R @ M, R.square().sum(-1)) if gram else (M.mT, R, R.new_zeros(()))

    def errors(D: Tensor) -> Tensor:
        D = D.movedim(0, -3)  # (..., K, n, I): K * n rows for every M
        product = (D.flatten(-3, -2) @ G).unflatten(-2, D.shape[-3:-1]) + L.unsqueeze(-3)
        error: Tensor = (product * D if gram else product.square()).sum(-1).double()  # (..., K, n)
        return (error + rest.unsqueeze(-2) if gram else error).movedim(-2, 0)

    return errors


def by_group(errors: Tensor, layout: Layout, axis: int | None) -> Tensor:
    """Errors of rows (K, ..., n) summed over each group (K, G), or over everything (K, 1) where rows mix groups."""
    if layout.groups == 1 or layout.axis != axis:
        return errors.flatten(1).sum(1, keepdim=True)
    return errors.movedim(axis + 1, 1).reshape(len(errors), layout.groups, -1).sum(2)


def tried_values(quantizer: Quantizer, x: Tensor, table: Table) -> Tensor:
    """The values (K, ...) of a tensor x (...) with each row of a table of parameters (K, G)."""
    (K, groups), axis = next(iter(table.values())).shape, quantizer.layout.axis
    trial = quantizer.tried(table)
    if groups == 1:
        return cast(Tensor, trial(x.expand(K, *x.shape)))
    front = x.movedim(axis, 0)
    out = trial(front.expand(K, *front.shape).flatten(0, 1))
    values: Tensor = out.unflatten(0, (K, -1)).movedim(1, axis if axis < 0 else axis + 1)
    return values
