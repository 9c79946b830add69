"""Arguments that reach the constructor of a timm model: which may be given, and in which ranges.

They come from ``model.model_args`` and from the card of a checkpoint. What timm alone can judge is left to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from qat.errors import QatError
from qat.ranges import Range, check_value

Side = Annotated[int, Range(1, 4096)]  # pixels
Depth = Annotated[int, Range(1, 1000)]
Width = Annotated[int, Range(1, 65536)]
Dropped = Annotated[float, Range(0, below=1)]
RANGES: dict[str, Any] = {
    "img_size": Side | tuple[Side, Side],
    "patch_size": Side | tuple[Side, Side],
    "depth": Depth,
    "depths": tuple[Depth, ...],
    "embed_dim": Width | tuple[Width, ...],
    "num_heads": Width | tuple[Width, ...],
    "mlp_ratio": Annotated[float, Range(above=0, high=100)],
    "drop_rate": Dropped,
    "pos_drop_rate": Dropped,
    "patch_drop_rate": Dropped,
    "proj_drop_rate": Dropped,
    "attn_drop_rate": Dropped,
}
OWN = {  # set by options of their own, which would win without a word
    "drop_path_rate": "model.drop_path",
    "num_classes": "model.num_classes",
    "checkpoint_path": "model.checkpoint",
    "pretrained": "model.checkpoint",
    "pretrained_cfg": "model.checkpoint",
    "pretrained_cfg_overlay": "model.checkpoint",
    "pretrained_strict": "model.checkpoint",
}
NO_CLASSIFIER = ("features_only", "out_indices", "feature_cfg")
LARGEST = 1_000_000  # of any other number, so that no typo asks for all memory


def check_model_args(given: Mapping[str, Any], name: str = "model.model_args") -> None:
    """Check arguments of a timm constructor; those that timm alone knows are only checked to be plain data.

    Args:
        given: arguments by name.
        name: what the errors call them.

    Raises:
        QatError: for one that an option of its own sets, that makes no classifier of RGB images, or out of range.
    """
    for key, value in given.items():
        if key in OWN:
            raise QatError(f"{name}.{key} is {value!r}: set it by {OWN[key]}, and leave it out here")
        if key in NO_CLASSIFIER:
            raise QatError(f"{name}.{key} is {value!r}: it makes a model without a classifier, so leave it out")
        if key == "in_chans" and value != 3:
            raise QatError(f"{name}.in_chans is {value!r}: images have 3 channels here, so leave it out")
        if key in RANGES and value is not None:
            check_value(f"{name}.{key}", value, RANGES[key])
        for part in _parts(value):
            if not isinstance(part, int | float | str | bool | None):
                raise QatError(f"{name}.{key} holds a {type(part).__name__}: give numbers, text, lists or mappings")
            if isinstance(part, int | float):
                check_value(f"{name}.{key}", part, Annotated[float, Range(-LARGEST, LARGEST)] | bool)
    _check_patches(given, name)


def _check_patches(given: Mapping[str, Any], name: str) -> None:
    image, patch = given.get("img_size"), given.get("patch_size")
    if isinstance(image, int) and isinstance(patch, int) and patch > image:
        raise QatError(f"{name}.patch_size is {patch}, larger than img_size {image}: no patch fits into an image")


def _parts(value: Any) -> Iterator[Any]:
    """The values inside lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value
