"""Lightning callbacks."""

from qat.callbacks.calibrate import Calibrate
from qat.callbacks.console import ConsoleLog
from qat.callbacks.predictions import WritePredictions
from qat.callbacks.record import RecordSites

__all__ = ["Calibrate", "ConsoleLog", "RecordSites", "WritePredictions"]
