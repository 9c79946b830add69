"""The options of the data: the keys below ``data`` in a config. Nothing here imports Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from qat.data.batch_size import DEFAULT_BATCH_SIZE
from qat.data.check import given_crop_options
from qat.data.crops import Area, CropDistribution, Probability, Ratio
from qat.errors import QatError
from qat.preprocessing import Interpolation, check_partial
from qat.ranges import Range, Seed, check_fields

BatchSize = Annotated[int, Range(1, 10_000_000)]


@dataclass(frozen=True)
class DataOptions:
    """Training crops, evaluation images and calibration images of a folder tree.

    Args:
        root: folder that holds train/<class>/* and val/<class>/*, or train.tar and val.tar, or a Hugging Face data set
            as hfds/PATH.
        val_labels: file with the labels of validation images that lie in one folder; found by its usual names, such as
            val.txt, when not given.
        class_map: file with the label of every class folder: one class per line in the format of timm, .csv or .json.
        classes: what some folders of ImageNet are: auto, classes among all 1,000; folders, all classes of the model.
        images: folder of images, searched recursively, to predict, or for qat calibrate to calibrate on, with any
            names and without labels; root/val, or root/train, when not given.
        global_batch_size: crops per optimizer step over all processes. It equals processes x batch_size x
            trainer.accumulate_grad_batches, of which the one that is not given is computed.
        batch_size: crops per process and forward pass, a multiple of crops_per_image. When not given, the share of
            global_batch_size, or 256 without that.
        val_batch_size: images per process and step in validation and prediction; batch_size when not given.
        crops_per_image: random crops made of each image every time it is decoded.
        crop_epochs: length of training, as the total number of crops made of every image.
        held_out: training images that are put aside, neither trained nor calibrated on. Training is validated on them
            too, by the KL to the teacher, or the loss on labels without one, and the best checkpoint is chosen by it.
        softlabels: store of soft labels, made by qat make-softlabels, whose crops are replayed and whose labels
            replace those of the folders; null draws new crops.
        softlabels_partial: train on the finished images of an unfinished store.
        crop_scale: lowest and highest area of a training crop, as a fraction of the image; that of the soft labels, or
            0.08 and 1, when not given.
        crop_ratio: lowest and highest width / height of a training crop; that of the soft labels, or 3/4 and 4/3, when
            not given.
        flip: probability that a training crop is mirrored left to right; that of the soft labels, or 0.5, when not
            given.
        train_interpolation: how training crops are resized: nearest, bilinear or bicubic.
        preprocessing: fields of the model's preprocessing (size, resize, interpolation, mean, std).
        workers: processes that decode images, per training process; as many as cores, at most 8, when not given.
        exif_orientation: turn images as the orientation in their EXIF says. When not given, only predict does so: no
            published result was measured on turned images.
        on_bad_image: what happens to an image that cannot be read: error stops the run, skip leaves it out and warns.
        seed: fixes the order of images and the crops; seed_everything, or 0, when not given.
    """

    root: Path | None = None
    val_labels: Path | None = None
    class_map: Path | None = None
    classes: Literal["auto", "folders"] = "auto"
    images: Path | None = None
    global_batch_size: BatchSize | None = None
    batch_size: BatchSize | None = None
    val_batch_size: BatchSize | None = None
    crops_per_image: Annotated[int, Range(1, 65535)] = 1
    crop_epochs: Annotated[int, Range(1, 100_000)] = 300
    held_out: Annotated[int, Range(0, 1_000_000_000)] = 0
    softlabels: Path | None = None
    softlabels_partial: bool = False
    crop_scale: tuple[Area, Area] | None = None
    crop_ratio: tuple[Ratio, Ratio] | None = None
    flip: Probability | None = None
    train_interpolation: Interpolation = "bilinear"
    preprocessing: dict[str, Any] | None = None
    workers: Annotated[int, Range(0, 1024)] | None = None
    exif_orientation: bool | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    seed: Seed | None = None

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        check_partial(self.preprocessing or {}, "data.preprocessing.")
        CropDistribution(**self.given_crop_options)
        sizes = {"batch_size": self.batch_size, "global_batch_size": self.global_batch_size}
        if self.batch_size is None and self.global_batch_size is None:
            sizes["batch_size"] = DEFAULT_BATCH_SIZE
        for name, size in sizes.items():
            if size is not None and size % self.crops_per_image:
                raise QatError(f"data.{name} {size} is not a multiple of crops_per_image {self.crops_per_image}")

    @property
    def given_crop_options(self) -> dict[str, Any]:
        """The options of the distribution of crops that are not None, by their names in `CropDistribution`."""
        return given_crop_options(self.crop_scale, self.crop_ratio, self.flip)
