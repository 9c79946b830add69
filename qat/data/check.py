"""Checks of folders and options that run before a model is built or downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qat.data.folder import class_names, class_names_of, find_images, find_loose_images
from qat.data.softlabels.reader import SoftLabels
from qat.errors import QatError


def check_data(verb: str, model: Any, data: Any, ckpt: Path | None, calibrates: bool) -> None:
    """Check the folders and the soft labels that ``verb`` reads; set ``num_classes`` and ``classes`` of ``model``.

    Args:
        verb: fit, validate or predict.
        model: options of the module, of which num_classes, classes and teacher are used.
        data: options of the data module.
        ckpt: checkpoint that the model comes from.
        calibrates: whether the run calibrates, which needs training images for every verb.

    Raises:
        QatError: a folder is missing or empty, or does not fit the model, the checkpoint or the soft labels.
    """
    if verb == "predict" and data.images is not None:
        find_loose_images(Path(data.images))
        if calibrates and data.root is None:
            raise QatError("data.root is not set: a model without --ckpt is calibrated on root/train")
    elif data.root is None:
        raise QatError("data.root is not set: give the folder with train/<class>/*.JPEG and val/<class>/*.JPEG")
    if data.root is None:
        return
    root = Path(data.root)
    for split in ("train", "val") if verb == "fit" else ("train",) if calibrates else ():
        find_images(root / split)
    if verb in ("validate", "predict") and data.images is None:
        find_images(root / "val")
    classes = class_names_of(root) if (root / "train").is_dir() else class_names(root / "val")
    if ckpt is not None and model.classes and classes != model.classes:
        other = next((c for c in classes if c not in model.classes), classes[0])
        raise QatError(
            f"data.root {root} has {len(classes)} classes, the checkpoint {len(model.classes)} others: "
            f"class {other!r} differs"
        )
    if model.num_classes not in (None, len(classes)):
        raise QatError(f"model.num_classes is {model.num_classes}, but {root} has {len(classes)} classes")
    if len(classes) < 2:
        raise QatError(f"data.root {root} has one class folder, {classes[0]!r}: a classifier needs at least two")
    model.num_classes, model.classes = len(classes), classes
    if verb == "fit" and data.softlabels is not None:
        if model.teacher is not None:
            raise QatError("data.softlabels and model.teacher both make labels: set one of them to null")
        crop_options = given_crop_options(data.crop_scale, data.crop_ratio, data.flip)
        SoftLabels.of(Path(data.softlabels), root / "train", classes, crop_options, data.softlabels_partial)


def given_crop_options(scale: object, ratio: object, flip: object) -> dict[str, Any]:
    """The options that are not None, by their names in `CropDistribution`."""
    options = {"scale": scale, "ratio": ratio, "flip": flip}
    return {name: value for name, value in options.items() if value is not None}


def at_least(name: str, value: int, lowest: int) -> int:
    """Return ``value``; QatError when it is below ``lowest``."""
    if value < lowest:
        raise QatError(f"data.{name} is {value}: it must be at least {lowest}")
    return value


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``; QatError when it is not among ``choices``."""
    if value not in choices:
        raise QatError(f"data.{name} is {value!r}: choose from {choices}")
    return value


def cores() -> int:
    """Number of cores that this process may use; in a container they are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
