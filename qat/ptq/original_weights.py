"""The weights that the layers of a unit had before steps of a calibration changed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qat.ptq.matrix_products import MatrixProduct


class OriginalWeights:
    """Copies of weights and biases, and the way back to them for a while."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Tensor, Tensor | None]] = {}  # layer, weight, bias; by the left operand's name

    def keep(self, model: nn.Module, product: MatrixProduct) -> None:
        """Copy the weight and the bias of a product's layer; nothing for a product of activations."""
        if product.matrices.weight is None:
            return
        layer: Any = model.get_submodule(product.right.rpartition(".")[0])
        copies = [None if x is None else x.detach().clone() for x in (layer.weight, layer.bias)]
        self._kept[product.left] = (layer, *copies)

    def of(self, product: MatrixProduct) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of a layer, before steps changed them."""
        _, weight, bias = self._kept[product.left]
        return weight, bias

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block, the layers have the weights and biases that were kept."""
        before = [
            (tensor, kept)
            for layer, *pair in self._kept.values()
            for tensor, kept in zip((layer.weight, layer.bias), pair, strict=True)
            if kept is not None
        ]
        now = [(tensor, tensor.data) for tensor, _ in before]
        for tensor, kept in before:
            tensor.data = kept
        try:
            yield
        finally:
            for tensor, kept in now:
                tensor.data = kept
