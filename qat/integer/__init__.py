"""A reference interpreter of quantized models: every product is one of integers.

    model = qat.integer.load("packed.safetensors")     # or any checkpoint
    logits = model(images)
    print(qat.integer.compare(qat.load("packed.safetensors"), images))
    for row in qat.integer.rows(model): print(row)

Operands are the whole numbers that codes stand for (`Quantizer.terms`), accumulators are int32, or int64 where 32 bits
could overflow. What follows a product is in floating point: the accumulator, rounded to float32, times the product of
both steps, plus the bias; it is what the next site quantizes (requantization). Softmax, LayerNorm and GELU are in
floating point, but for `LogIntSoftmax` and `IntegerNorm`, which compute with integers, in the simulation too. A product
stays one of floats where an operand has no codes: `rows` tells. It is made for comparison, not for speed: torch
multiplies int32 at a tenth of the speed of float32.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qat import checkpoint
from qat.integer.compare import compare
from qat.integer.describe import Operation, rows
from qat.integer.modules import use_integers

__all__ = ["Operation", "compare", "load", "rows", "use_integers"]


def load(path: str | Path, trust: bool = False) -> nn.Module:
    """The model of a checkpoint, packed or not, with products of integers, in evaluation mode on the CPU.

    Args:
        path: of the file.
        trust: quantizers that the checkpoint names by a dotted path may be imported.

    Raises:
        QatError: the file is no checkpoint, or a quantizer has no form in whole numbers.
    """
    return use_integers(checkpoint.load(path, trust))
