"""Weights of official DeiT, Swin, SReT and VVTQ files, translated to our names and shapes.

VVTQ (arXiv 2307.00331) has three projections where timm has one, and each of its quantizers q owns up to four tensors:

    q.nbits (1,)        the width b
    q.alpha (7,)        one step for each width 2..8; the quantizer uses alpha[b - 2] and never the others
    q.beta (7,)         likewise one offset for each width, in units of the input; only some activations have it
    q.init_state (1,)   1 once the step is set

The quantizer of a weight has the name of its layer. A file does not say which model it holds, nor which quantizers are
signed: both follow from the names. Nothing is guessed: a missing or unexpected name, or another shape, type or width,
stops the conversion.
"""

from qat.official.conversion import Converted, convert
from qat.official.steps import ReductionBits

__all__ = ["Converted", "ReductionBits", "convert"]
