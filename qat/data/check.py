"""Checks of folders and options that run before a model is built or downloaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from qat.data.classes import Classes, Tree
from qat.data.decode import decode, reason
from qat.data.folder import are_numbers, wnids
from qat.data.source import Source
from qat.data.splits import loose_source
from qat.errors import QatError

log = logging.getLogger(__name__)


def check_data(verb: str, model: Any, data: Any, ckpt: Path | None, calibrates: bool, evaluates: bool = True) -> None:
    """Check the images and the soft labels that ``verb`` reads; set ``num_classes`` and ``classes`` of ``model``.

    Args:
        verb: fit, validate, calibrate or predict.
        model: options of the module, of which num_classes, classes, teacher and what gives its weights are used.
        data: options of the data module.
        ckpt: checkpoint that the model comes from.
        calibrates: whether the run calibrates, which needs training images, or for `qat calibrate` any images.
        evaluates: whether a calibration is followed by an evaluation.

    Raises:
        QatError: images are missing, cannot be read, or do not fit the model, the checkpoint or the soft labels.
    """
    loose = data.images is not None and verb in ("predict", "calibrate")
    if loose:
        check_readable(loose_source(Path(data.images)))
    _check_root(verb, data.root, loose, calibrates, evaluates)
    if data.root is None and loose and not (verb == "calibrate" and evaluates):
        return
    tree = Tree.of(data)
    used = {
        "train": verb == "fit" or (calibrates and not (verb == "calibrate" and loose)),
        "val": evaluates and not (verb == "predict" and loose),
    }
    sources = [tree.source(split) for split in used if used[split]]
    classes = tree.number((ckpt is not None and model.classes) or _numbers(model.num_classes, tree))
    for source in sources:
        classes.of(source)
        check_readable(source)
    _check_number(model.num_classes, classes, tree)
    keeps_head = ckpt is None and model.quant_checkpoint is None and model.checkpoint and not model.fresh_head
    if keeps_head and tree.class_map is None:
        _warn_of_unnamed(classes, tree)
    model.num_classes, model.classes = len(classes.names), list(classes.names)
    if verb == "fit" and data.softlabels is not None:
        _check_softlabels(model, data, tree.source("train"), classes)


def _check_root(verb: str, root: Path | None, loose: bool, calibrates: bool, evaluates: bool) -> None:
    """QatError for a calibration without images, or an evaluation without validation images."""
    if root is None and verb == "calibrate" and loose and evaluates:
        raise QatError("validate is true, but data.root is not set: give the folder with val/, or leave --validate out")
    if root is None and verb == "predict" and loose and calibrates:
        raise QatError("data.root is not set: a model without --ckpt is calibrated on root/train")
    if root is None and verb == "calibrate" and not loose:
        raise QatError(
            "data.root is not set: give the folder with train/<class>/*.JPEG, or any images as --data.images FOLDER"
        )


def check_readable(source: Source) -> None:
    """QatError when not a single image of the source can be read; nothing could be measured on it."""
    first = ""
    for index in range(len(source)):
        try:
            decode(source.open(index))
            return
        except Exception as error:  # Pillow has no common base
            first = first or f"{source.path(index)}: {reason(error)}"
    raise QatError(f"none of the {len(source)} images of {source.place} can be read, first {first}")


def _numbers(num_classes: int | None, tree: Tree) -> list[str]:
    """Numbers as the names of the classes, where fewer folders than ``model.num_classes`` have numbers for names."""
    if num_classes is None or tree.class_map is not None:
        return []
    keys = tree.keys()
    if len(keys) < num_classes and are_numbers(keys) and max(map(int, keys)) < num_classes:
        return [str(number) for number in range(num_classes)]
    return []


def _check_number(num_classes: int | None, classes: Classes, tree: Tree) -> None:
    """QatError for another number of classes than the model is to have, or for a single one."""
    count = len(classes.names)
    if num_classes not in (None, count):
        way_out = ""
        if tree.classes == "auto" and classes.names == wnids():
            way_out = ": all its folders are of ImageNet; --data.classes folders takes those that exist as all classes"
        raise QatError(f"model.num_classes is {num_classes}, but {tree.root} has {count} classes{way_out}")
    if count < 2:
        place = tree.place("train" if tree.has("train") else "val") / classes.names[0]
        below = sorted(entry.name for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else []
        hint = f"; {place} has {len(below)} folders, {below[0]!r}, ...: are those the classes?" if below else ""
        raise QatError(
            f"data.root {tree.root} has one class folder, {classes.names[0]!r}: a classifier needs at least two{hint}"
        )


def _warn_of_unnamed(classes: Classes, tree: Tree) -> None:
    """Say how folders are numbered where the model has a head already, but no names of its classes to compare with."""
    if classes.names == wnids() or not (are_numbers(classes.names) or len(classes.names) == len(wnids())):
        return
    first, second, *_ = classes.names
    log.warning(
        "%s: the weights do not say the names of their classes, so they cannot be matched by name: %r is taken as "
        "class 0, %r as class 1, and so on; data.class_map can give others", tree.root, first, second,
    )  # fmt: skip


def _check_softlabels(model: Any, data: Any, source: Source, classes: Classes) -> None:
    """QatError for soft labels of other images, or beside options that contradict them."""
    from qat.data.softlabels.reader import SoftLabels

    if model.teacher is not None:
        raise QatError("data.softlabels and model.teacher both make labels: set one of them to null")
    if data.exif_orientation:
        raise QatError("data.exif_orientation turns images, but soft labels are made on images as they are stored: "
                       "leave one of them out")  # fmt: skip
    crop_options = given_crop_options(data.crop_scale, data.crop_ratio, data.flip)
    SoftLabels.of(Path(data.softlabels), source, classes.names, crop_options, data.softlabels_partial)


def given_crop_options(scale: object, ratio: object, flip: object) -> dict[str, Any]:
    """The options that are not None, by their names in `CropDistribution`."""
    options = {"scale": scale, "ratio": ratio, "flip": flip}
    return {name: value for name, value in options.items() if value is not None}


def cores() -> int:
    """Number of cores that this process may use; in a container they are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
