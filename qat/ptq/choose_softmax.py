"""The quantizer of each layer's probabilities, chosen by the error of their product with the values.

Softmax differs from layer to layer: some attend to a few tokens, where a logarithm has its codes, others to all tokens
almost evenly, where even steps do. Every candidate has at most ``2**bits`` levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from qat.errors import QatError
from qat.ptq.fpcs import space_of
from qat.ptq.matrix_products import MatrixProduct, matrix_products
from qat.ptq.output_search import OutputSearch
from qat.ptq.product_search import Operand, ProductSearch
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import SAMPLES, Work, drawn
from qat.quantizers import AdaLog, BitLog2, LogSqrt2, Quantizer, Spec, Uniform
from qat.quantizers.adalog import MAX_ADALOG_BITS
from qat.quantizers.bitlog2 import MAX_BITLOG_BITS
from qat.quantizers.logarithmic import MAX_LOG_BITS
from qat.ranges import Range, check_fields

Kind = Literal["uniform", "logsqrt2", "bitlog2", "adalog"]
KINDS: tuple[Kind, ...] = ("uniform", "logsqrt2", "bitlog2", "adalog")
MOST_BITS: dict[Kind, int] = {"logsqrt2": MAX_LOG_BITS, "bitlog2": MAX_BITLOG_BITS, "adalog": MAX_ADALOG_BITS}
SITE = "probs_quant"


@dataclass
class ChooseSoftmax(Step):
    """Put, at each ``probs_quant``, the quantizer with the least error in place of that of the recipe.

    What is chosen becomes a rule of the model's recipe; the report has the mean squared error of each candidate.

    Args:
        kinds: the candidates; bitlog2 has at most 4 bits and is left out above.
        rows: rows of the product on which they are compared.
    """

    kinds: Sequence[Kind] = KINDS
    rows: Annotated[int, Range(1, 1_000_000_000)] = 6304

    stage = Stage.SEARCH

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.kinds:
            raise QatError(f"ChooseSoftmax: kinds is empty: give some of {', '.join(KINDS)}")

    def begin(self, work: Work) -> None:
        """Refuse a site of more bits than any candidate has."""
        names = [product.left for product in matrix_products(work.model) if product.left.rpartition(".")[2] == SITE]
        if work.wanted and not any(isinstance(work.model.get_submodule(name), Quantizer) for name in names):
            raise QatError(
                f"ChooseSoftmax finds no site {SITE} that is quantized and multiplied with v: the recipe leaves "
                "it in floating point, or its quantizer takes the place of the softmax; leave ChooseSoftmax out"
            )
        for name, quantizer in work.wanted.items():
            if name.rpartition(".")[2] == SITE and not candidates(quantizer.spec, self.kinds):
                raise QatError(
                    f"ChooseSoftmax: none of {', '.join(self.kinds)} has {quantizer.spec.width} bits, those of "
                    f"{name!r}: add uniform to kinds"
                )

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Choose for one layer, if this is the product of its probabilities with its values."""
        old = here.work.wanted.get(product.left)
        if old is None or product.left.rpartition(".")[2] != SITE:
            return
        found, _ = OutputSearch(rows=self.rows).operands(here, product)
        probs, matrices = found[product.left], product.matrices
        values = Operand(here.model.get_submodule(product.right), found[product.right], matrices.right, None)
        errors: dict[str, float] = {}
        tried: dict[str, Quantizer] = {}
        for spec in candidates(old.spec, self.kinds):
            quantizer: Quantizer = spec.build(old.layout).to(old.step.device)
            rows = drawn(torch.cat([quantizer.grouped(x) for x in probs], dim=1), SAMPLES, axis=1)
            quantizer.init_from(rows)
            left = Operand(quantizer, probs, matrices.left, matrices.axes[0], space_of(quantizer, rows))
            search, name = ProductSearch(left, values), type(spec).__name__
            search.search_(rounds=1)
            errors[name], tried[name] = search.error(), quantizer
        best = min(errors, key=lambda name: errors[name])
        here.replace(product.left, tried[best])
        here.work.report.setdefault("softmax", {})[product.left] = {"chosen": best, "errors": errors}


def candidates(spec: Spec, kinds: Sequence[Kind]) -> list[Spec]:
    """The specs of candidates, with the width and the granularity of another spec."""
    options: dict[str, Any] = {"bits": spec.width, "granularity": spec.granularity}
    classes: dict[Kind, type[Spec]] = {"uniform": Uniform, "logsqrt2": LogSqrt2, "bitlog2": BitLog2, "adalog": AdaLog}
    return [classes[kind](**options) for kind in kinds if spec.width <= MOST_BITS.get(kind, spec.width)]
