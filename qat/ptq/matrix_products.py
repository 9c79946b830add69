"""The matrix products of a quantized model whose operands can be searched together."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from qat.sites.products import Matrices


class MatrixProduct(NamedTuple):
    """A product of a model: the names of the sites of its operands, and how these are seen as matrices."""

    left: str
    right: str
    matrices: Matrices

    @property
    def activations(self) -> tuple[str, ...]:
        """The sites whose tensors depend on the images."""
        return (self.left, self.right) if self.matrices.weight is None else (self.left,)


def matrix_products(model: nn.Module) -> list[MatrixProduct]:
    """Every product whose operands can be seen as matrices, in the order of the module tree."""
    return [
        MatrixProduct(f"{name}.{product.left}", f"{name}.{product.right}", product.matrices)
        for name, module in model.named_modules()
        if hasattr(module, "products")
        for product in module.products()
        if product.matrices is not None
    ]
