"""Ranges with the least error of every matrix product: the initialization of AdaLog, APHQ-ViT and FIMA-Q.

Both operands start from samples of their own tensor, by the ``init`` that their spec names. Then ranges for one of them
are tried while the other stays as it is quantized, in turn, and compared by the error of the product.

The input of a unit (the embedding, a block, the head) comes from the quantized units before it; inside the unit,
operands and products are those of the float model. These three papers use the float input of the unit, with which
DeiT-Tiny loses five points at 4 bits. If the target were the product of the float input and the operand that of the
quantized one, everything would shrink towards zero at 3 bits, as regression on noisy inputs does.
Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.ptq.base import PTQMethod, raise_unless_calibrated, uncalibrated
from qat.ptq.capture import capture
from qat.ptq.matrix_products import MatrixProduct, matrix_products
from qat.ptq.product_search import Operand, ProductSearch, candidate_table, searchable
from qat.quantizers import Quantizer
from qat.ranges import Range, Seed, check_fields
from qat.sites.family import family_of
from qat.sites.insert import quantizers, switched_off

TOKENS = 16384  # rows of the input of a layer that are kept, of all batches together


@dataclass
class OutputSearch(PTQMethod):
    """Fills any recipe; a quantizer without a range, or outside of any product, starts by the ``init`` of its spec.

    Args:
        rounds: how often both operands of a product are improved, at most.
        rows: rows of the output of a product on which candidates for an activation are compared.
        samples: values of each group for the ``init``, and for the ends of the ranges that are tried.
        seed: seeds the draw of rows and values.
    """

    rounds: Annotated[int, Range(1, 1000)] = 3
    rows: Annotated[int, Range(1, 1_000_000_000)] = 512
    samples: Annotated[int, Range(1, 1_000_000_000)] = 20_000
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate every site that is not calibrated yet; QatError if no image reaches one of them."""
        family_of(model).units(model)  # QatError, before any work, where the family is no chain
        weights, activations = uncalibrated(model)
        for name, weight, quantizer in weights:
            _start(name, quantizer, quantizer.grouped(weight.float()))
        wanted = {site.name: site.quantizer for site in weights} | activations
        if wanted:
            self._walk(model, list(batches), wanted)
        for name, quantizer in activations.items():
            if not quantizer.calibrated:
                raise QatError(f"no calibration image reached {name!r}: raise calibration.images")

    def _walk(self, model: nn.Module, tensors: list[Tensor], wanted: Mapping[str, Quantizer]) -> None:
        """Calibrate unit by unit, each on a part of what reaches its sites while all of them are off."""
        products = [product for product in matrix_products(model) if product.left in wanted or product.right in wanted]
        of = {name: product for product in products for name in product.activations}
        alone = {name: q for name, q in wanted.items() if name not in of and q.layout.batched}
        sites = {name: model.get_submodule(name) for name in of} | alone

        def keep(name: str, x: Tensor) -> Tensor:
            if name in of:
                return self._samples(of[name], x.float(), batches)
            return self._drawn(alone[name].grouped(x.float()), ceil(self.samples / batches), axis=1)

        batches, everything = len(tensors), [quantizer for _, quantizer in quantizers(model)]
        with Progress("matrix products", len(products)) as progress:
            for unit in family_of(model).units(model) if tensors else []:
                with switched_off(everything):
                    _, parts = capture(unit, tensors, sites, keep)
                found = {name: kept if name in alone else _joined(kept) for name, kept in parts.items()}
                for name, kept in found.items():
                    if name in wanted:
                        rows = torch.cat(kept, dim=1) if name in alone else _rows(wanted[name], kept)
                        _start(name, wanted[name], self._thinned(rows))
                here = [product for product in products if all(name in found for name in product.activations)]
                for product in here:
                    self._search(model, product, wanted, found)
                progress.advance(len(here))
                tensors = [unit.run(x) for x in tensors]

    def _search(
        self, model: nn.Module, product: MatrixProduct, wanted: Mapping[str, Quantizer],
        found: Mapping[str, list[Tensor]],
    ) -> None:  # fmt: skip
        """Improve both operands of a product, which have started."""
        seen = product.matrices
        left = self._operand(model, product.left, found[product.left], seen.left, seen.axes[0], wanted)
        x = found[product.right] if seen.weight is None else [seen.weight.float()]
        right = self._operand(model, product.right, x, seen.right, seen.axes[1], wanted)
        ProductSearch(left, right, self.rows).search_(self.rounds)

    def _operand(
        self, model: nn.Module, name: str, tensors: list[Tensor], matrix: Callable[[Tensor], Tensor], axis: int | None,
        wanted: Mapping[str, Quantizer],
    ) -> Operand:  # fmt: skip
        """One side of a product, with candidates where its site is to be calibrated and can be searched."""
        operand = Operand(model.get_submodule(name), tensors, matrix, axis)
        if name in wanted and searchable(wanted[name]):
            operand.table = candidate_table(wanted[name], self._thinned(_rows(wanted[name], tensors)))
        return operand

    def _samples(self, product: MatrixProduct, x: Tensor, batches: int) -> Tensor:
        """As many samples of one batch of an operand as give their part of the rows that are needed."""
        x = product.matrices.samples(x)
        rows = self.rows if product.matrices.weight is None else TOKENS
        return self._drawn(x, ceil(rows / product.matrices.rows_of(x) / batches))

    def _thinned(self, rows: Tensor) -> Tensor:
        """At most ``samples`` of the columns of rows (G, n)."""
        return self._drawn(rows, self.samples, axis=1)

    def _drawn(self, x: Tensor, count: int, axis: int = 0) -> Tensor:
        """At most ``count`` entries along an axis: the same for all tensors of one length, so that operands match."""
        size = x.shape[axis]
        if size <= count:
            return x
        picks = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))[:count]
        return x.index_select(axis, picks.to(x.device))


def _joined(kept: list[Tensor]) -> list[Tensor]:
    """One tensor for each shape of a sample: groups of tokens may differ in size from visit to visit."""
    shapes = dict.fromkeys(x.shape[1:] for x in kept)
    return [torch.cat([x for x in kept if x.shape[1:] == shape]) for shape in shapes]


def _rows(quantizer: Quantizer, tensors: list[Tensor]) -> Tensor:
    """The values of every group (G, n), of all tensors."""
    return torch.cat([quantizer.grouped(x) for x in tensors], dim=1)


def _start(name: str, quantizer: Quantizer, samples: Tensor) -> None:
    """Choose parameters from samples (G, n), and switch the quantizer on."""
    quantizer.init_from(samples)
    raise_unless_calibrated(name, quantizer)
    quantizer.enabled = True
