"""Float models and their quantized forms: importing this package registers every family."""

from qat.models import layers, sret, swin, vit
from qat.models.build import build_float, default_preprocessing, read_weights
from qat.models.optim import param_groups, regroup

__all__ = [
    "build_float",
    "default_preprocessing",
    "layers",
    "param_groups",
    "read_weights",
    "regroup",
    "sret",
    "swin",
    "vit",
]
