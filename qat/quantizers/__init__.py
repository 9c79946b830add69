"""Quantizers: importing this package registers every spec under its class name."""

from qat.quantizers.base import FloatSite, Quantizer
from qat.quantizers.lsq import LSQ, LSQQuantizer
from qat.quantizers.product import product

__all__ = ["LSQ", "FloatSite", "LSQQuantizer", "Quantizer", "product"]
