"""Losses on the weights themselves; YAML names the class."""

from qat.regularizers.base import Regularizer, named
from qat.regularizers.bins import BinRegularizer
from qat.regularizers.dampening import Dampening

__all__ = ["BinRegularizer", "Dampening", "Regularizer", "named"]
