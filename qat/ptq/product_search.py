"""Ranges of the two operands of a matrix product that leave the least error in its output.

The product is Z = X M^T, per matrix of a batch. While candidates for X are tried, M stays as it is quantized now, q(M),
and the target Y is the product in the float model. With D = q(X) - X and R = X q(M)^T - Y, the error of every row is

    |D q(M)^T + R|^2   =   (D G + 2 L) * D summed,  + |R|^2,        G = q(M)^T q(M),   L = R q(M)

whichever takes less work: the second form needs M once and no more for any number of candidates. No difference of
large numbers is taken, because G and L only see deviations.
Shapes: K candidates, n rows of X, O rows of M, I columns of both, G groups that share a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from qat.ptq.search import BLOCK, OTHER_BLOCK, Ranges, percentiles, shrunk
from qat.quantizers import Layout, Quantizer, Spec
from qat.quantizers.spec import Table

CANDIDATES = 128
SHIFTS = 16  # of them, at most, for every width
SHARE = 0.9  # of the values above the lower end, and below the upper end, of the narrowest range
NARROWEST = 2**-6  # of the full range, where the zero point stays

Rows = Callable[[Tensor], Tensor]


@dataclass
class Operand:
    """One side of a product.

    Args:
        site: what quantizes it, or a `FloatSite`.
        x: what reaches the site in the float model.
        matrix: from the shape of ``x``, perhaps with axes before its own, to (..., n, I).
        axis: the axis of ``x`` along which parts have rows of their own; None where no axis has.
        table: candidates (K, G) for the parameters of the site; None where nothing is tried.
    """

    site: nn.Module
    x: Tensor
    matrix: Rows
    axis: int | None
    table: Table | None = None

    def values(self) -> Tensor:
        """q(X), (..., n, I)."""
        return self.matrix(self.site(self.x))


@dataclass
class ProductSearch:
    """A product; its target Y (..., n, O) is that of the float operands.

    Args:
        left, right: X and M.
        rows: rows of X on which its candidates are compared, where X is one matrix; those of M are on all rows.
    """

    left: Operand
    right: Operand
    rows: int

    def __post_init__(self) -> None:
        self.target = self.left.matrix(self.left.x) @ self.right.matrix(self.right.x).mT

    @torch.no_grad()
    def error(self) -> float:
        """The mean square of the error of the output."""
        return float((self.left.values() @ self.right.values().mT - self.target).square_().mean())

    @torch.no_grad()
    def search_(self, rounds: int) -> None:
        """Improve one operand after the other, until nothing changes; the error of the product does not grow."""
        best, kept = self.error(), self._parameters()
        for _ in range(rounds):
            improve_(self.right, self.left.values(), self.target.mT)
            changed = improve_(*self._left())
            error = self.error()
            if not error < best:
                self._restore(kept)
                return
            best, kept = error, self._parameters()
            if not changed:  # so the right operand would be compared on the same terms
                return

    def _left(self) -> tuple[Operand, Tensor, Tensor]:
        """The left operand, thinned, what it meets, and its target."""
        operand, target = self.left, self.target
        stride = len(target) // self.rows if target.ndim == 2 else 1
        if stride > 1 and len(operand.x) > 1:
            target = target.unflatten(0, (len(operand.x), -1))[::stride].flatten(0, 1)
            operand = replace(operand, x=operand.x[::stride])
        return operand, self.right.values(), target

    def _parameters(self) -> list[Tensor]:
        return [tensor.clone() for site in (self.left.site, self.right.site) for tensor in _tensors(site)]

    def _restore(self, kept: list[Tensor]) -> None:
        now = [tensor for site in (self.left.site, self.right.site) for tensor in _tensors(site)]
        for tensor, value in zip(now, kept, strict=True):
            tensor.copy_(value)


def _tensors(site: nn.Module) -> list[Tensor]:
    return [*site.parameters(), *site.buffers()]


def searchable(site: nn.Module) -> bool:
    """The site has a range, and nothing that the range leaves open."""
    return isinstance(site, Quantizer) and site.ranged and not site.refines


def candidates(quantizer: Quantizer, samples: Tensor) -> Table:
    """Candidates (K, G) for the parameters of a quantizer, from samples (G, n): those of the ranges `ranges`."""
    return quantizer.from_range(*ranges(quantizer.spec, samples))


def ranges(spec: Spec, samples: Tensor) -> Ranges:
    """Low and high (K, G) from samples (G, n).

    Where the zero point can move, widths from the range between the quantiles `SHARE` and 1 - `SHARE` to that of all
    samples, each shifted by whole steps. Otherwise the range of all samples, shrunk by factors down to `NARROWEST` with
    a constant ratio, so that a tensor with far outliers has as many candidates as one without.
    """
    low, high = samples.amin(1), samples.amax(1)
    if not spec.movable:
        return shrunk(low, high, torch.logspace(0, 1, CANDIDATES, base=NARROWEST).tolist())
    shifts = min(SHIFTS, 2**spec.width)
    shares = torch.linspace(0, 1, CANDIDATES // shifts, device=low.device)[:, None]
    inner = percentiles(samples, (SHARE,))
    low, high = torch.lerp(inner[0], low, shares), torch.lerp(inner[1], high, shares)  # (widths, G)
    shift = torch.arange(shifts, device=low.device) - shifts // 2
    moved = (high - low)[:, None] / (2**spec.width - 1) * shift[:, None]  # (widths, shifts, G)
    return (low[:, None] + moved).flatten(0, 1), (high[:, None] + moved).flatten(0, 1)


@torch.no_grad()
def improve_(operand: Operand, other: Tensor, target: Tensor) -> bool:
    """Give every group the candidate with the least error, where that is less than it has now; tell whether any is.

    Groups whose errors are not apart (channels of an input are summed over) take the same candidate, together.

    Args:
        operand: X.
        other: q(M), (..., O, I).
        target: Y, (..., n, O).
    """
    if operand.table is None:
        return False
    quantizer, table = cast(Quantizer, operand.site), operand.table
    X = operand.matrix(operand.x)
    of_rows = row_errors(X, other, target)

    def errors(values: Tensor) -> Tensor:
        return by_group(of_rows(operand.matrix(values) - X), quantizer.layout, operand.axis)

    together = max(1, BLOCK.get(X.device.type, OTHER_BLOCK) // operand.x.numel())
    found = torch.cat([errors(tried(quantizer, operand.x, part)) for part in _parts(table, together)])
    least, best = found.nan_to_num(nan=torch.inf).min(0)  # (G,), or (1,) where groups are not apart
    better = least < errors(quantizer(operand.x)[None])[0]
    for name, rows in table.items():
        now = getattr(quantizer, name)
        now.copy_(torch.where(better, rows.gather(0, best.expand(rows.shape[1])[None])[0], now))
    return bool(better.any())


def _parts(table: Table, together: int) -> Iterator[Table]:
    """Some rows of a table after the other."""
    for k in range(0, len(next(iter(table.values()))), together):
        yield {name: rows[k : k + together] for name, rows in table.items()}


def row_errors(X: Tensor, M: Tensor, Y: Tensor) -> Rows:
    """A function of deviations D (K, ..., n, I) of X (..., n, I): the squared error of every row, (K, ..., n).

    Args:
        X: the operand without error.
        M: what it is multiplied with, (..., O, I).
        Y: what the product should be, (..., n, O).
    """
    R = X @ M.mT - Y
    gram = M.shape[-2] > M.shape[-1]
    G, L, rest = (M.mT @ M, 2 * R @ M, R.square().sum(-1)) if gram else (M.mT, R, R.new_zeros(()))

    def errors(D: Tensor) -> Tensor:
        D = D.movedim(0, -3)  # (..., K, n, I): one matrix of K * n rows for every M
        product = (D.flatten(-3, -2) @ G).unflatten(-2, D.shape[-3:-1]) + L.unsqueeze(-3)
        error: Tensor = (product * D if gram else product.square()).sum(-1).double()  # (..., K, n)
        return (error + rest.unsqueeze(-2) if gram else error).movedim(-2, 0)

    return errors


def by_group(errors: Tensor, layout: Layout, axis: int | None) -> Tensor:
    """Errors of rows (K, ..., n) summed over what shares a step, (K, G), or over all, (K, 1)."""
    if layout.groups == 1 or layout.axis != axis:
        return errors.flatten(1).sum(1, keepdim=True)
    return errors.movedim(axis + 1, 1).reshape(len(errors), layout.groups, -1).sum(2)


def tried(quantizer: Quantizer, x: Tensor, table: Table) -> Tensor:
    """The values (K, ...) that a tensor x (...) has with each row of a table of parameters (K, G)."""
    (K, groups), axis = next(iter(table.values())).shape, quantizer.layout.axis
    trial = quantizer.tried(table)
    if groups == 1:
        return cast(Tensor, trial(x.expand(K, *x.shape)))
    front = x.movedim(axis, 0)
    out = trial(front.expand(K, *front.shape).flatten(0, 1))
    values: Tensor = out.unflatten(0, (K, -1)).movedim(1, axis if axis < 0 else axis + 1)
    return values
