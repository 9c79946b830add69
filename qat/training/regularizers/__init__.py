"""Losses on quantized weights; a config names the class."""

from qat.training.regularizers.base import Regularizer, named
from qat.training.regularizers.bins import BinRegularizer
from qat.training.regularizers.dampening import Dampening

__all__ = ["BinRegularizer", "Dampening", "Regularizer", "named"]
