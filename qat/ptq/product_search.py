"""Ranges of the two operands of a matrix product that leave the least error in its output.

The product is Z = X M^T, per matrix of a batch. While candidates for X are tried, M stays as it is quantized now, q(M),
and the target Y is the product in the float model. With D = q(X) - X and R = X q(M)^T - Y, the error of every row is

    |D q(M)^T + R|^2   =   (D G + 2 L) * D summed,  + |R|^2,        G = q(M)^T q(M),   L = R q(M)

The form that takes less work is used: the second needs M only once, for any number of candidates. Neither takes a
difference of large numbers, because D and R are deviations.
Shapes: K candidates, n rows of X, O rows of M, I columns of both, G groups that share a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from qat.ptq.search import BLOCK, OTHER_BLOCK, Ranges, percentiles, shrunk
from qat.quantizers import Layout, Quantizer, Spec
from qat.quantizers.spec import Table

CANDIDATES = 128
SHIFTS = 16  # the most candidates of one width
INNER = 0.9  # the narrowest movable range lies between the quantiles 1 - INNER and INNER
NARROWEST = 2**-6  # the narrowest range that cannot move, as a part of the full one

Map = Callable[[Tensor], Tensor]


@dataclass
class Operand:
    """One side of a product.

    Args:
        site: what quantizes it, or a `FloatSite`.
        tensors: what reaches the site in the float model; more than one where its matrices differ in shape.
        matrix: from the shape of such a tensor, perhaps with axes before its own, to (..., n, I).
        axis: the axis of a tensor whose slices have different rows; None where every slice has a part of every row.
        table: candidates (K, G) for the parameters of the site; None where nothing is tried.
    """

    site: nn.Module
    tensors: Sequence[Tensor]
    matrix: Map
    axis: int | None
    table: Table | None = None

    def values(self) -> list[Tensor]:
        """q(X), (..., n, I), of each tensor."""
        return [self.matrix(self.site(x)) for x in self.tensors]


@dataclass
class ProductSearch:
    """A product; its target Y (..., n, O) is the product of the float operands.

    Args:
        left, right: X and M, with as many tensors each.
        rows: rows on which candidates for X are compared, where X is a single matrix; M is compared on all rows.
    """

    left: Operand
    right: Operand
    rows: int

    def __post_init__(self) -> None:
        pairs = zip(self.left.tensors, self.right.tensors, strict=True)
        self.targets = [self.left.matrix(x) @ self.right.matrix(m).mT for x, m in pairs]

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
        for _ in range(rounds):
            improve_(self.right, self.left.values(), [target.mT for target in self.targets])
            changed = improve_(*self._left())
            error = self.error()
            if not error < best:
                self._restore(kept)
                return
            best, kept = error, self._parameters()
            if not changed:  # the right operand would be compared with the same left one again
                return

    def _left(self) -> tuple[Operand, list[Tensor], list[Tensor]]:
        """The left operand, on about ``rows`` rows; the values of the right one; the targets of these rows."""
        thinned = [self._thinned(x, target) for x, target in zip(self.left.tensors, self.targets, strict=True)]
        operand = replace(self.left, tensors=[x for x, _ in thinned])
        return operand, self.right.values(), [target for _, target in thinned]

    def _thinned(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Evenly spaced samples of a tensor, and the rows of the target that they give."""
        stride = len(target) // self.rows if target.ndim == 2 else 1
        if stride <= 1 or len(x) <= 1:
            return x, target
        return x[::stride], target.unflatten(0, (len(x), -1))[::stride].flatten(0, 1)

    def _parameters(self) -> list[Tensor]:
        return [tensor.clone() for site in (self.left.site, self.right.site) for tensor in _tensors(site)]

    def _restore(self, kept: list[Tensor]) -> None:
        now = [tensor for site in (self.left.site, self.right.site) for tensor in _tensors(site)]
        for tensor, value in zip(now, kept, strict=True):
            tensor.copy_(value)


def _tensors(site: nn.Module) -> list[Tensor]:
    return [*site.parameters(), *site.buffers()]


def searchable(site: nn.Module) -> bool:
    """Whether the site has a range that determines all of its parameters."""
    return isinstance(site, Quantizer) and site.ranged and not site.refines


def candidate_table(quantizer: Quantizer, samples: Tensor) -> Table:
    """Candidates (K, G) for the parameters of a quantizer, from samples (G, n), by way of `candidate_ranges`."""
    return quantizer.from_range(*candidate_ranges(quantizer.spec, samples))


def candidate_ranges(spec: Spec, samples: Tensor) -> Ranges:
    """Low and high (K, G) from samples (G, n).

    Where the zero point can move, the widths grow evenly from the range between the quantiles 1 - `INNER` and `INNER`
    to the full range, and each is shifted by whole steps. Otherwise the full range shrinks by a constant ratio down to
    `NARROWEST`, so that a tensor with far outliers has as many useful candidates as one without.
    """
    low, high = samples.amin(1), samples.amax(1)
    if not spec.movable:
        return shrunk(low, high, torch.logspace(0, 1, CANDIDATES, base=NARROWEST).tolist())
    shifts = min(SHIFTS, 2**spec.width)
    shares = torch.linspace(0, 1, CANDIDATES // shifts, device=low.device)[:, None]
    inner = percentiles(samples, (INNER,))
    low, high = torch.lerp(inner[0], low, shares), torch.lerp(inner[1], high, shares)  # (widths, G)
    shift = torch.arange(shifts, device=low.device) - shifts // 2
    moved = (high - low)[:, None] / (2**spec.width - 1) * shift[:, None]  # (widths, shifts, G)
    return (low[:, None] + moved).flatten(0, 1), (high[:, None] + moved).flatten(0, 1)


@torch.no_grad()
def improve_(operand: Operand, others: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    """Give every group the candidate with the least error, where that is less than its present error.

    Groups whose errors cannot be told apart (a row sums over the channels of an input) take the same candidate.

    Args:
        operand: X.
        others: q(M), (..., O, I), for each tensor of the operand.
        targets: Y, (..., n, O), for each tensor.

    Returns:
        Whether any group has changed.
    """
    if operand.table is None:
        return False
    quantizer, table = cast(Quantizer, operand.site), operand.table
    matrices = [operand.matrix(x) for x in operand.tensors]
    error_maps = [row_errors(*parts) for parts in zip(matrices, others, targets, strict=True)]

    def errors(quantized: Map) -> Tensor:
        """(K, G), from the map of a tensor to its values (K, ...)."""
        found = [
            by_group(error_map(operand.matrix(quantized(x)) - X), quantizer.layout, operand.axis)
            for x, X, error_map in zip(operand.tensors, matrices, error_maps, strict=True)
        ]
        return sum(found[1:], found[0])

    together = BLOCK.get(matrices[0].device.type, OTHER_BLOCK) // max(x.numel() for x in operand.tensors)
    blocks = _blocks(table, max(1, together))
    found = torch.cat([errors(partial(tried_values, quantizer, table=block)) for block in blocks])
    least, best = found.nan_to_num(nan=torch.inf).min(0)  # (G,), or (1,) where groups cannot be told apart
    better = least < errors(lambda x: quantizer(x)[None])[0]
    for name, rows in table.items():
        now = getattr(quantizer, name)
        now.copy_(torch.where(better, rows.gather(0, best.expand(rows.shape[1])[None])[0], now))
    return bool(better.any())


def _blocks(table: Table, together: int) -> Iterator[Table]:
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
