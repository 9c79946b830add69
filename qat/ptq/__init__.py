"""Post-training calibration: values for the parameters of quantizers, without training."""

from qat.ptq.base import PTQMethod
from qat.ptq.init_steps import InitSteps

__all__ = ["InitSteps", "PTQMethod"]
