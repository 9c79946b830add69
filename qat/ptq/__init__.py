"""Post-training calibration: chooses the parameters of quantizers without training."""

from collections.abc import Iterable

from torch import Tensor, nn

from qat.ptq.aiqvit import AIQViT
from qat.ptq.aphq_vit import APHQViT
from qat.ptq.apq_vit import APQViT, BlockSearch
from qat.ptq.base import PTQMethod
from qat.ptq.brecq import BRECQ
from qat.ptq.channel_steps import FoldChannels, SplitChannels
from qat.ptq.choose_softmax import ChooseSoftmax
from qat.ptq.fima_q import FIMAQ
from qat.ptq.fold_norms import FoldNorms
from qat.ptq.frontier import Frontier
from qat.ptq.full_range import FullRange
from qat.ptq.glf_q import GLFQ
from qat.ptq.hessian_search import HessianSearch
from qat.ptq.init_steps import InitSteps
from qat.ptq.is_vit import FitWeights, ISViT
from qat.ptq.observe import Observe
from qat.ptq.output_search import OutputSearch
from qat.ptq.pd_quant import PDQuant
from qat.ptq.ptq4vit import PTQ4ViT
from qat.ptq.qdrop import QDrop
from qat.ptq.reconstruction.reconstruct import Reconstruct
from qat.ptq.repq_vit import Percentiles, RepQViT
from qat.ptq.rotate_heads import RotateHeads
from qat.ptq.rotate_residual import RotateResidual
from qat.ptq.site_errors import site_errors
from qat.ptq.step import Stage, Step
from qat.ptq.steps import Preset, Steps
from qat.ptq.tensor_search import TensorSearch
from qat.ptq.weight_correction import GPTQ, BiasCorrection, Ridge

__all__ = [
    "BRECQ",
    "FIMAQ",
    "GLFQ",
    "GPTQ",
    "AIQViT",
    "APHQViT",
    "APQViT",
    "BiasCorrection",
    "BlockSearch",
    "ChooseSoftmax",
    "FitWeights",
    "FoldChannels",
    "FoldNorms",
    "Frontier",
    "FullRange",
    "HessianSearch",
    "ISViT",
    "InitSteps",
    "Observe",
    "OutputSearch",
    "PDQuant",
    "PTQ4ViT",
    "PTQMethod",
    "Percentiles",
    "Preset",
    "QDrop",
    "Reconstruct",
    "RepQViT",
    "Ridge",
    "RotateHeads",
    "RotateResidual",
    "SplitChannels",
    "Stage",
    "Step",
    "Steps",
    "TensorSearch",
    "calibrate",
    "site_errors",
]


def calibrate(model: nn.Module, batches: Iterable[Tensor], method: PTQMethod | None = None) -> None:
    """Calibrate ``model``, in place, on normalized images (B, 3, S, S), by ``method`` or else by `InitSteps`."""
    (method or InitSteps())(model, batches)
