"""Quantizers: importing this package registers every spec under its class name."""

from qat.quantizers.base import FloatSite, Quantizer
from qat.quantizers.lsq import LSQ, LSQQuantizer
from qat.quantizers.product import product
from qat.quantizers.uniform import Uniform, UniformQuantizer

__all__ = ["LSQ", "FloatSite", "LSQQuantizer", "Quantizer", "Uniform", "UniformQuantizer", "product"]
