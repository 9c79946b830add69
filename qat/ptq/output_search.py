"""Ranges chosen for the output of every matrix product: the initialization of AdaLog, APHQ-ViT and FIMA-Q.

Both operands start from samples of their own, by the ``init`` that their spec names. Then the ranges of one are tried
while the other stays as it is quantized, in turn, and what counts is the error of the product.

The input of a unit (the embedding, a block, the head) comes from the quantized units before it; inside the unit,
operands and products are those of the float model. With the float input too, as in these three, DeiT-Tiny loses five
points at 4 bits. With the product of the float input as the target of a quantized one, everything shrinks towards zero
at 3 bits: noise in a regressor does that.
Shapes: G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.ptq.base import PTQMethod, raise_unless_calibrated, uncalibrated
from qat.ptq.capture import capture
from qat.ptq.operands import Operands, operands_of
from qat.ptq.product_search import Operand, ProductSearch, candidates, searchable
from qat.quantizers import Quantizer
from qat.sites.family import family_of
from qat.sites.insert import quantizers, switched_off

TOKENS = 16384  # rows of the input of a layer that are kept, of all batches


@dataclass
class OutputSearch(PTQMethod):
    """Fills any recipe; a kind of quantizer without a range, and a site of no product, gets its own ``init``.

    Args:
        rounds: at most so often are both operands of a product improved.
        rows: of the output of a product, on which candidates for an activation are compared.
        samples: values of each group for the ``init``, and for the ends of the ranges that are tried.
        seed: of what is drawn.
    """

    rounds: int = 3
    rows: int = 512
    samples: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "rows", "samples"):
            if getattr(self, name) < 1:
                raise QatError(f"{name} is {getattr(self, name)}: give at least 1")

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate every site that is not calibrated yet; QatError for one that no image reaches."""
        family_of(model).units(model)  # QatError, before any work, of a model that is no chain
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
        """Unit by unit; a part of what reaches the sites of one, while they are off, is kept until they are fitted."""
        products = [product for product in operands_of(model) if product.left in wanted or product.right in wanted]
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
                found = {name: torch.cat(kept, dim=int(name in alone)) for name, kept in parts.items()}
                for name, x in found.items():
                    if name in wanted:
                        _start(name, wanted[name], self._thinned(x if name in alone else wanted[name].grouped(x)))
                here = [product for product in products if all(name in found for name in product.activations)]
                for product in here:
                    self._search(model, product, wanted, found)
                progress.advance(len(here))
                tensors = [unit.run(x) for x in tensors]

    def _search(
        self, model: nn.Module, product: Operands, wanted: Mapping[str, Quantizer], found: Mapping[str, Tensor]
    ) -> None:
        """Both operands of a product, from where they stand."""
        seen = product.matrices
        left = self._operand(model, product.left, found[product.left], seen.left, seen.axes[0], wanted)
        x = found[product.right] if seen.weight is None else seen.weight.float()
        right = self._operand(model, product.right, x, seen.right, seen.axes[1], wanted)
        ProductSearch(left, right, self.rows).search_(self.rounds)

    def _operand(
        self, model: nn.Module, name: str, x: Tensor, matrix: Callable[[Tensor], Tensor], axis: int | None,
        wanted: Mapping[str, Quantizer],
    ) -> Operand:  # fmt: skip
        """One side of a product, with candidates where its site is to be calibrated and can be searched."""
        operand = Operand(model.get_submodule(name), x, matrix, axis)
        if name in wanted and searchable(wanted[name]):
            operand.table = candidates(wanted[name], self._thinned(wanted[name].grouped(x)))
        return operand

    def _samples(self, product: Operands, x: Tensor, batches: int) -> Tensor:
        """What is kept of one batch of an operand: as many samples as give the rows that are needed."""
        x = product.matrices.samples(x)
        rows = self.rows if product.matrices.weight is None else TOKENS
        return self._drawn(x, ceil(rows / product.matrices.rows_of(x) / batches))

    def _thinned(self, rows: Tensor) -> Tensor:
        """(G, n) to what a search for a range is given."""
        return self._drawn(rows, self.samples, axis=1)

    def _drawn(self, x: Tensor, count: int, axis: int = 0) -> Tensor:
        """At most so many along an axis: the same of all tensors of one length, so that operands match."""
        size = x.shape[axis]
        if size <= count:
            return x
        picks = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))[:count]
        return x.index_select(axis, picks.to(x.device))


def _start(name: str, quantizer: Quantizer, samples: Tensor) -> None:
    """Parameters from samples (G, n), and the switch on."""
    quantizer.init_from(samples)
    raise_unless_calibrated(name, quantizer)
    quantizer.enabled = True
