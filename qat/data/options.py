"""The options of the data: what stands under ``data`` in a config. Nothing here loads Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qat.data.check import at_least, given_law, one_of
from qat.data.crops import CropLaw
from qat.errors import QatError
from qat.preprocessing import INTERPOLATIONS


@dataclass(frozen=True)
class DataOptions:
    """Training crops, evaluation views and calibration images of a folder tree.

    Args:
        root: folder that holds train/<class>/* and val/<class>/*.
        images: folder of images to predict, searched recursively; root/val when not given.
        batch_size: crops per process and training step; a multiple of crops_per_image.
        val_batch_size: images per process and step in validation and prediction; batch_size when not given.
        crops_per_image: random crops made of each image every time it is decoded.
        crop_epochs: length of training, as the number of crops every image gives in all.
        softlabels: store of soft labels, made by qat make-softlabels, whose crops are replayed and whose labels
            replace those of the folders; null draws crops anew.
        softlabels_partial: train on the finished images of an unfinished store.
        crop_scale: lowest and highest area of a training crop, as a part of the image; that of the soft labels, or
            0.08 and 1, when not given.
        crop_ratio: lowest and highest width / height of a training crop; that of the soft labels, or 3/4 and 4/3.
        flip: probability that a training crop is mirrored left to right; that of the soft labels, or 0.5.
        train_interpolation: how training crops are resized: nearest, bilinear or bicubic.
        preprocessing: fields of the model's preprocessing (size, resize, interpolation, mean, std).
        workers: processes that decode images, per training process; as many as cores, at most 8, when not given.
        on_bad_image: what an unreadable image does: stop the run, or be skipped with a warning.
        seed: fixes the order of images and the crops; seed_everything, or 0, when not given.
    """

    root: Path | None = None
    images: Path | None = None
    batch_size: int = 256
    val_batch_size: int | None = None
    crops_per_image: int = 1
    crop_epochs: int = 300
    softlabels: Path | None = None
    softlabels_partial: bool = False
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] | None = None
    flip: float | None = None
    train_interpolation: str = "bilinear"
    preprocessing: dict[str, Any] | None = None
    workers: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("val_batch_size", 1), ("crops_per_image", 1), ("crop_epochs", 1),
                             ("workers", 0), ("seed", 0)):  # fmt: skip
            if (value := getattr(self, name)) is not None:
                at_least(name, value, lowest)
        one_of("train_interpolation", self.train_interpolation, INTERPOLATIONS)
        one_of("on_bad_image", self.on_bad_image, ("error", "skip"))
        CropLaw(**self.given_law)
        if self.batch_size % self.crops_per_image:
            raise QatError(
                f"data.batch_size {self.batch_size} is not a multiple of crops_per_image {self.crops_per_image}"
            )

    @property
    def given_law(self) -> dict[str, Any]:
        """Those options of the distribution of crops that were given."""
        return given_law(self.crop_scale, self.crop_ratio, self.flip)
