"""Quantizers: importing this package registers every spec under its class name."""

from qat.quantizers.base import FloatSite, Quantizer
from qat.quantizers.bitlog2 import BitLog2, BitLog2Quantizer
from qat.quantizers.integer_norm import IntegerNorm, IntegerNormQuantizer
from qat.quantizers.log_int_softmax import LogIntSoftmax, LogIntSoftmaxQuantizer
from qat.quantizers.logarithmic import LogSqrt2, LogSqrt2Quantizer
from qat.quantizers.lsq import LSQ, LSQQuantizer
from qat.quantizers.product import product
from qat.quantizers.ptf import PTF, PTFQuantizer
from qat.quantizers.uniform import Uniform, UniformQuantizer

__all__ = [
    "LSQ",
    "PTF",
    "BitLog2",
    "BitLog2Quantizer",
    "FloatSite",
    "IntegerNorm",
    "IntegerNormQuantizer",
    "LSQQuantizer",
    "LogIntSoftmax",
    "LogIntSoftmaxQuantizer",
    "LogSqrt2",
    "LogSqrt2Quantizer",
    "PTFQuantizer",
    "Quantizer",
    "Uniform",
    "UniformQuantizer",
    "product",
]
