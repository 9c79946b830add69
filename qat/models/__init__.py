"""Float models and their quantized forms: importing this package registers every family."""

from qat.models import beit, eva, layers, mlp, parallel, sret, swin, vit
from qat.models.arch import default_preprocessing
from qat.models.build import build_float
from qat.models.optim import param_groups, regroup
from qat.models.weights import read_weights

__all__ = [
    "beit",
    "build_float",
    "default_preprocessing",
    "eva",
    "layers",
    "mlp",
    "parallel",
    "param_groups",
    "read_weights",
    "regroup",
    "sret",
    "swin",
    "vit",
]
