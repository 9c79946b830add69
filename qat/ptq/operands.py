"""The matrix products of a quantized model whose operands can be searched together."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from qat.sites.products import Matrices


class Operands(NamedTuple):
    """Both operands of a product, by the names of their sites in the model, and how they are seen as matrices."""

    left: str
    right: str
    matrices: Matrices

    @property
    def activations(self) -> tuple[str, ...]:
        """The sites that images reach."""
        return (self.left, self.right) if self.matrices.weight is None else (self.left,)


def operands_of(model: nn.Module) -> list[Operands]:
    """Of all products of matrices, in the order of the module tree."""
    return [
        Operands(f"{name}.{product.left}", f"{name}.{product.right}", product.matrices)
        for name, module in model.named_modules()
        if hasattr(module, "products")
        for product in module.products()
        if product.matrices is not None
    ]
