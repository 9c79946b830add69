"""Imports the soft labels of FKD, which are a file per image, into one store (docs/softlabels.md).

qat import-fkd LABELS --data.root /path/to/imagenet --teacher tf_efficientnet_l2.ns_jft_in1k_475
       --label_type marginal_smoothing_k5 --out labels.h5

LABELS holds imagenet/train/<class>/<image>.tar, train/<class>/<image>.tar or <class>/<image>.tar. Every image of
data.root/train needs its file. A run that was stopped continues when it is started again with the same options.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from qat.data.crops import Area, CropDistribution, Probability, Ratio
from qat.data.softlabels.fkd import LabelFolder, class_folder
from qat.data.softlabels.fkd_label_types import LABEL_TYPES
from qat.data.softlabels.locking import only_maker
from qat.data.softlabels.opening import open_store
from qat.data.softlabels.store import Header, sha256_of
from qat.data.softlabels.writer import Writer
from qat.data.source import Source
from qat.labeling.output import check_out, prepare
from qat.labeling.plan import SPLIT, Folder
from qat.labeling.report import Report, how_far
from qat.preprocessing import Deviation, Interpolation, Mean, Preprocessing
from qat.progress import Progress
from qat.ranges import Range, check_fields
from qat.runs.stop import Stopped, defer, deferred, raise_if_told

log = logging.getLogger(__name__)
UNKNOWN: dict[str, Any] = {
    "teacher_sha256": "",
    "seed": -1,
    "batch_size": 0,
    "precision": "unknown",
}  # the label files do not say


@dataclass(frozen=True)
class Options:
    """What to import and how it was made, which the label files do not say; the defaults are those of FKD.

    Args:
        labels: folder of the label files.
        data: the images that the labels were made on.
        teacher: name of the model that made the labels.
        label_type: kind of labels in the files.
        out: file to write; an unfinished one is continued if it was begun with the same options.
        trust_pickles: also read files of more than arrays, which could run code; only for people you trust.
        teacher_input_size: side of the crops that the teacher saw, pixels.
        interpolation: how they were resized: nearest, bilinear or bicubic.
        mean: mean that the teacher's input was normalized with, per channel.
        std: standard deviation that the teacher's input was normalized with, per channel.
        temperature: number that the logits were divided by.
        crop_scale: lowest and highest area of a crop, as a fraction of the image.
        crop_ratio: lowest and highest width / height of a crop.
        flip: probability that a crop is mirrored left to right.
    """

    labels: Path
    data: Folder
    teacher: str
    label_type: Literal[
        "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm", "marginal_renorm_k5", "smoothing",
        "hard", "ori",
    ]  # fmt: skip
    out: Path
    trust_pickles: bool = False
    teacher_input_size: Annotated[int, Range(1, 4096)] = 475
    interpolation: Interpolation = "bicubic"
    mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    temperature: Annotated[float, Range(above=0, high=1_000_000)] = 1.0
    crop_scale: tuple[Area, Area] = (0.08, 0.936)
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    flip: Probability = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "")
        CropDistribution(self.crop_scale, self.crop_ratio, self.flip)
        check_out(self.out)

    def header(self, crops: int, paths: Sequence[str], classes: Sequence[str]) -> Header:
        """The header of the store; QatError for options that no store can have."""
        size, kind = self.teacher_input_size, LABEL_TYPES[self.label_type]
        seen = Preprocessing(size, size, self.interpolation, self.mean, self.std)
        distribution = CropDistribution(self.crop_scale, self.crop_ratio, self.flip)
        return Header(
            **UNKNOWN,
            teacher=self.teacher,
            teacher_input_size=seen.size,
            teacher_interpolation=seen.interpolation,
            mean=seen.mean,
            std=seen.std,
            temperature=self.temperature,
            label_type=kind.stored_as,
            top_k=kind.top_k or len(classes),
            num_crops=crops,
            num_classes=len(classes),
            crop_scale=distribution.scale,
            crop_ratio=distribution.ratio,
            flip_p=distribution.flip,
            split=SPLIT,
            class_list_sha256=sha256_of(classes),
            path_list_sha256=sha256_of(paths),
        )


def import_fkd(options: Options) -> None:
    """Import the labels of every image that has none yet.

    Raises:
        QatError: bad options, or a label file that is missing, damaged or of another kind.
    """
    images, classes = options.data.source, options.data.class_names
    paths = images.names
    base = class_folder(options.labels, classes)
    source = LabelFolder(base, LABEL_TYPES[options.label_type], len(classes), options.trust_pickles)
    source.check(paths)
    crops = source.crops(paths[0])
    if source.is_half(paths[0]):
        log.warning("boxes in half precision: those of large images can be a pixel off (docs/softlabels.md)")
    source.read(paths[0], images.open(0), crops)  # finds a wrong label_type before a store is created
    with only_maker(options.out):
        prepare(options.out, options.header(crops, paths, classes), paths, classes, options.data.targets)
        report = Report(options.out, options.data.root)
        try:
            with deferred():
                defer()
                _import(options.out, source, images, crops)
        except Stopped as stopped:
            raise Stopped(stopped.signum, how_far(options.out)) from None
        report.end()


def _import(out: Path, source: LabelFolder, images: Source, crops: int) -> None:
    with open_store(out) as file:
        todo = np.flatnonzero(file["done"][:] == 0).tolist()
    with Writer(out) as writer, Progress("images", len(todo)) as progress:
        for index in todo:
            writer.put(index, source.read(images.names[index], images.open(index), crops))
            progress.advance(1)
            raise_if_told()
