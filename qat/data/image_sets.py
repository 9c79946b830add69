"""Which images serve what: the sets for training, validation, calibration and prediction, and the held-out images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from qat.data.classes import Classes, Tree
from qat.data.held_out import Indices, Parts, put_aside
from qat.data.images import EvalView, Images, View
from qat.data.options import DataOptions
from qat.data.softlabels.reader import SoftLabels
from qat.data.source import Source
from qat.data.splits import loose_source
from qat.errors import QatError
from qat.preprocessing import Preprocessing

log = logging.getLogger(__name__)
TRIES = {"error": 1, "skip": 100}  # files tried for one training sample; more unreadable ones in a row: a broken disk


class ImageSets:
    """The images that options describe, by what they are used for; listed when they are first asked for.

    Args:
        options: the options.
        known: classes of the model in the order of their labels; empty where they are not known.
        calibration_folder: folder of images to calibrate on in place of the training images; labels are not needed.
    """

    def __init__(self, options: DataOptions, known: Sequence[str], calibration_folder: Path | None) -> None:
        self.options, self.known, self.calibration_folder = options, tuple(known), calibration_folder

    @property
    def tree(self) -> Tree:
        """Where the images are; QatError if root is not set."""
        return Tree.of(self.options)

    @cached_property
    def classes(self) -> Classes:
        """The classes and their labels; QatError if root is not set or there are no images."""
        return self.tree.number(self.known)

    @cached_property
    def store(self) -> SoftLabels | None:
        """The soft labels; QatError when they were made on other images or with other crop options."""
        if self.options.softlabels is None:
            return None
        crop_options, partial = self.options.given_crop_options, self.options.softlabels_partial
        source, names = self.tree.source("train"), list(self.classes.names)
        store = SoftLabels.of(self.options.softlabels, source, names, crop_options, partial)
        log.info("soft labels of %s", store)
        return store

    @cached_property
    def parts(self) -> Parts:
        """The training images that are used, and those that are held out."""
        return put_aside(len(self.tree.source("train")), self.options.held_out)

    def trained(self) -> Indices:
        """The images that are trained on: all, or those of an unfinished store that have labels."""
        if self.store is None:
            return self.parts.used
        found = np.intersect1d(self.parts.used, np.flatnonzero(self.store.done))
        if not len(found):
            raise QatError(f"data.held_out is {self.options.held_out}, and all images with soft labels are among them")
        return found

    def preprocessing(self) -> Preprocessing:
        """That of the model; QatError if it is not set."""
        if self.options.preprocessing is None:
            raise QatError("data.preprocessing is not set: it takes the model's size, resize, interpolation, mean, std")
        try:
            return Preprocessing(**self.options.preprocessing)
        except TypeError as error:
            raise QatError(f"data.preprocessing is {self.options.preprocessing}: {error}") from error

    def training(self, view: View) -> Images:
        """The images that are trained on, in the crops of a view."""
        return self._labelled("train", view, TRIES[self.options.on_bad_image], self.trained())

    def held_out(self) -> Images:
        """The training images that are put aside, in the evaluation transform."""
        return self._labelled("train", EvalView(self.preprocessing()), chosen=self.parts.held_out)

    def validation(self) -> Images:
        """The validation images, in the evaluation transform."""
        return self._labelled("val", EvalView(self.preprocessing()))

    def calibration(self) -> Images:
        """What a calibration chooses from: training images that are used, or those of its folder, without labels."""
        tries = TRIES[self.options.on_bad_image]
        if self.calibration_folder is None:
            return self._labelled("train", EvalView(self.preprocessing()), tries, self.parts.used)
        return self._unlabelled(loose_source(self.calibration_folder), tries)

    def prediction(self) -> Images:
        """The images to predict, without labels."""
        return self._unlabelled(self.prediction_source())

    def prediction_source(self) -> Source:
        """The images of a folder that the options name, otherwise the validation images; QatError if there are none."""
        images = self.options.images
        return self.tree.source("val") if images is None else loose_source(images)

    def _labelled(self, split: str, view: View, tries: int = 1, chosen: Indices | None = None) -> Images:
        source = self.tree.source(split)
        return Images(source, self.classes.of(source), view, tries, chosen, bool(self.options.exif_orientation))

    def _unlabelled(self, source: Source, tries: int = 1) -> Images:
        upright = self.options.exif_orientation is not False
        return Images(source, None, EvalView(self.preprocessing()), tries, upright=upright)
