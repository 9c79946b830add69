"""Lightning callbacks."""

from qat.callbacks.calibrate import Calibrate
from qat.callbacks.console import ConsoleLog
from qat.callbacks.gradient_ratio import GradientRatio
from qat.callbacks.last import SaveLast
from qat.callbacks.oscillation import IterativeFreezing, OscillationTracker
from qat.callbacks.predictions import WritePredictions
from qat.callbacks.record import RecordSites

__all__ = [
    "Calibrate",
    "ConsoleLog",
    "GradientRatio",
    "IterativeFreezing",
    "OscillationTracker",
    "RecordSites",
    "SaveLast",
    "WritePredictions",
]
