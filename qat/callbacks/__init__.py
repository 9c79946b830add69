"""Lightning callbacks."""

from qat.callbacks.average import WeightAverage
from qat.callbacks.calibrate import Calibrate
from qat.callbacks.console import ConsoleLog
from qat.callbacks.end_together import EndTogether
from qat.callbacks.final_validation import FinalValidation
from qat.callbacks.frozen_codes import FrozenCodes
from qat.callbacks.gradient_ratio import GradientRatio
from qat.callbacks.integers import IntegerProducts
from qat.callbacks.last import SaveLast
from qat.callbacks.oscillation import IterativeFreezing, OscillationTracker
from qat.callbacks.place import PlaceModule
from qat.callbacks.predictions import WritePredictions
from qat.callbacks.progress_bar import ProgressBar
from qat.callbacks.record import RecordSites

__all__ = [
    "Calibrate",
    "ConsoleLog",
    "EndTogether",
    "FinalValidation",
    "FrozenCodes",
    "GradientRatio",
    "IntegerProducts",
    "IterativeFreezing",
    "OscillationTracker",
    "PlaceModule",
    "ProgressBar",
    "RecordSites",
    "SaveLast",
    "WeightAverage",
    "WritePredictions",
]
