"""Quantizers: importing this package registers every spec under its class name."""

from qat.quantizers.adalog import AdaLog, AdaLogQuantizer, folded_bias
from qat.quantizers.bitlog2 import BitLog2, BitLog2Quantizer
from qat.quantizers.dfq import DFQ, DFQQuantizer
from qat.quantizers.integer_norm import IntegerNorm, IntegerNormQuantizer
from qat.quantizers.layout import Affine, Layout
from qat.quantizers.log_int_softmax import LogIntSoftmax, LogIntSoftmaxQuantizer
from qat.quantizers.logarithmic import LogSqrt2, LogSqrt2Quantizer
from qat.quantizers.lsq import LSQ, LSQQuantizer
from qat.quantizers.ptf import PTF, PTFQuantizer
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.recompute import operands_kept, recompute_operands
from qat.quantizers.spec import Spec
from qat.quantizers.sulq import SULQ, SULQQuantizer
from qat.quantizers.twin_gelu import TwinGelu, TwinGeluQuantizer
from qat.quantizers.twin_softmax import TwinSoftmax, TwinSoftmaxQuantizer
from qat.quantizers.uniform import Uniform, UniformQuantizer

__all__ = [
    "DFQ",
    "LSQ",
    "PTF",
    "SULQ",
    "AdaLog",
    "AdaLogQuantizer",
    "Affine",
    "BitLog2",
    "BitLog2Quantizer",
    "DFQQuantizer",
    "IntegerNorm",
    "IntegerNormQuantizer",
    "LSQQuantizer",
    "Layout",
    "LogIntSoftmax",
    "LogIntSoftmaxQuantizer",
    "LogSqrt2",
    "LogSqrt2Quantizer",
    "PTFQuantizer",
    "Quantizer",
    "SULQQuantizer",
    "Spec",
    "TwinGelu",
    "TwinGeluQuantizer",
    "TwinSoftmax",
    "TwinSoftmaxQuantizer",
    "Uniform",
    "UniformQuantizer",
    "folded_bias",
    "operands_kept",
    "recompute_operands",
]
