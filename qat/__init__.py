"""Low-bit quantization of vision transformers that people can trust.

The names below are for notebooks and loops of one's own; they are loaded when first used, because torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.checkpoint import load as load
    from qat.models import build_float as build_float
    from qat.ptq import calibrate as calibrate
    from qat.recipe import build_recipe as build_recipe
    from qat.sites.insert import quantize as quantize

__version__ = "0.1.0"
__all__ = ["build_float", "build_recipe", "calibrate", "load", "quantize"]
_HOMES = {
    "build_float": "qat.models",
    "build_recipe": "qat.recipe",
    "calibrate": "qat.ptq",
    "load": "qat.checkpoint",
    "quantize": "qat.sites.insert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
