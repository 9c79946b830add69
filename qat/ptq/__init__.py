"""Post-training calibration: chooses the parameters of quantizers without training."""

from collections.abc import Iterable

from torch import Tensor, nn

from qat.ptq.base import PTQMethod
from qat.ptq.init_steps import InitSteps
from qat.ptq.observe import Observe
from qat.ptq.output_search import OutputSearch
from qat.ptq.repq_vit import RepQViT
from qat.ptq.site_errors import site_errors

__all__ = ["InitSteps", "Observe", "OutputSearch", "PTQMethod", "RepQViT", "calibrate", "site_errors"]


def calibrate(model: nn.Module, batches: Iterable[Tensor], method: PTQMethod | None = None) -> None:
    """Calibrate ``model``, in place, on normalized images (B, 3, S, S), by ``method`` or else by `InitSteps`."""
    (method or InitSteps())(model, batches)
