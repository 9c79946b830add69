"""Weights of official DeiT, Swin, SReT and VVTQ files, translated to our names and shapes.

VVTQ (arXiv 2307.00331) has three projections where timm has one, and each of its quantizers q owns up to four tensors:

    q.nbits (1,)        the width b
    q.alpha (7,)        a step for each width 2..8; the step is alpha[b - 2], the others are dead
    q.beta (7,)         offsets likewise, in units of the input, at some activations only
    q.init_state (1,)   1 once the step is set

The quantizer of a weight is named as its layer. A file states neither model nor signs: those follow from the names.
Nothing is guessed: one name too many or too few, another shape, type or width stops the conversion.
"""

from qat.official.conversion import Converted, convert
from qat.official.steps import ReductionBits

__all__ = ["Converted", "ReductionBits", "convert"]
