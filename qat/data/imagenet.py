"""ImageNet, or any class-folder tree, as uint8 batches. Shapes: b images in a batch, S their side in pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from qat.data.batch_size import split_global_batch
from qat.data.calibration import calibration_loader
from qat.data.check import cores
from qat.data.classes import Classes, Tree
from qat.data.crops import CropDistribution
from qat.data.held_out import Indices, Parts, put_aside
from qat.data.images import Batch, CropView, EvalView, Images, View, load
from qat.data.listing import LIST, with_list
from qat.data.options import DataOptions
from qat.data.order import ResumableBatchSampler, batches_done, batches_per_pass, longer_passes, shuffled
from qat.data.softlabels.reader import SoftLabels
from qat.data.softlabels.replay import ReplayView
from qat.data.source import Source
from qat.data.splits import loose_source
from qat.data.unreadable import UnreadableImages
from qat.errors import QatError
from qat.preprocessing import Preprocessing

__all__ = ["Batch", "ImageNetDataModule"]
log = logging.getLogger(__name__)
START: dict[str, Any] = {"epoch": 0, "batches": 0, "passes": ()}  # state of a run that has not begun
TRIES = {"error": 1, "skip": 100}  # files tried for one training sample; more unreadable ones in a row: a broken disk


class ImageNetDataModule(L.LightningDataModule):
    """Training crops, evaluation images and calibration images of a data set.

    Args:
        options: the options.
        classes: those of the model in the order of their labels, where they are known, as from a checkpoint.
        calibration_folder: folder of images to calibrate on in place of the training images; labels are not needed.

    Attributes:
        batch_size: training crops per process and forward pass. With ``global_batch_size`` it depends on the number of
            processes, which `plan_batches` or `setup` learns; before that it is the value for one process.
    """

    def __init__(
        self, options: DataOptions, classes: Sequence[str] | None = None, calibration_folder: Path | None = None
    ) -> None:
        super().__init__()
        self.options, self._known, self._calibration_folder = options, tuple(classes or ()), calibration_folder
        self.workers = min(cores(), 8) if options.workers is None else options.workers
        self.seed = options.seed or 0
        self.crop_distribution = CropDistribution(**options.given_crop_options)
        self.unreadable = UnreadableImages(skip=options.on_bad_image == "skip")
        self.plan_batches(1, None)
        self._epoch, self._resumed = 0, START

    @property
    def tree(self) -> Tree:
        """Where the images are; QatError if root is not set."""
        return Tree.of(self.options)

    @cached_property
    def _classes(self) -> Classes:
        return self.tree.number(self._known)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their labels; QatError if root is not set or there are no images."""
        return list(self._classes.names)

    @property
    def num_classes(self) -> int:
        """Number of classes: 1,000 for ImageNet, even when only some of its folders exist."""
        return len(self.classes)

    @property
    def passes(self) -> list[int]:
        """Crops per image in each pass over the images; its length is the number of Trainer epochs."""
        return longer_passes(self.options.crop_epochs, self.options.crops_per_image, self._resumed.get("passes", []))

    @property
    def val_batch_size(self) -> int:
        """Images per process and step in validation and prediction."""
        return self.batch_size if self.options.val_batch_size is None else self.options.val_batch_size

    def plan_batches(self, processes: int, accumulate: int | None) -> int:
        """Set `batch_size` for this number of processes; return the ``accumulate_grad_batches`` that goes with it.

        Args:
            processes: training processes, one per device.
            accumulate: ``accumulate_grad_batches`` of the Trainer; None leaves the choice to ``global_batch_size``.

        Raises:
            QatError: ``global_batch_size`` cannot be split over the processes.
        """
        sizes = self.options.global_batch_size, self.options.batch_size
        self.batch_size, accumulate = split_global_batch(*sizes, processes, accumulate, self.options.crops_per_image)
        return accumulate

    def batches_per_pass(self, world_size: int = 1, epochs: int | None = None) -> list[int]:
        """Batches of each of ``world_size`` processes in each of the first ``epochs`` passes (in all when None)."""
        passes = self.passes if epochs is None else [self._crops(epoch) for epoch in range(epochs)]
        return batches_per_pass(len(self._trained()), self.batch_size, passes, world_size)

    @cached_property
    def store(self) -> SoftLabels | None:
        """The soft labels; QatError when they were made on other images or with other crop options."""
        if self.options.softlabels is None:
            return None
        crop_options, partial = self.options.given_crop_options, self.options.softlabels_partial
        store = SoftLabels.of(self.options.softlabels, self.tree.source("train"), self.classes, crop_options, partial)
        log.info("soft labels of %s", store)
        return store

    @cached_property
    def _parts(self) -> Parts:
        """The training images that are used, and those that are held out."""
        return put_aside(len(self.tree.source("train")), self.options.held_out)

    def _trained(self) -> Indices:
        """The images that are trained on: all, or those of an unfinished store that have labels."""
        if self.store is None:
            return self._parts.used
        found = np.intersect1d(self._parts.used, np.flatnonzero(self.store.done))
        if not len(found):
            raise QatError(f"data.held_out is {self.options.held_out}, and all images with soft labels are among them")
        return found

    def setup(self, stage: str) -> None:
        """Check the folders that the stage reads, the preprocessing and the batch size; QatError if one is unusable."""
        self._preprocessing()
        if stage == "fit" and self.trainer is not None and self.options.global_batch_size is not None:
            accumulate = self.plan_batches(self.trainer.world_size, self.trainer.accumulate_grad_batches)
            self.trainer.accumulate_grad_batches = accumulate
        if stage == "predict":
            self._prediction_source()
            return
        if stage == "validate" and getattr(self.trainer, "limit_val_batches", 1) == 0:
            return  # a calibration that is not evaluated
        if stage == "fit":
            self._trained()
        self._classes.of(self.tree.source("val"))
        log.info("%d classes in %s", self.num_classes, self.options.root)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The pass ``trainer.current_epoch``; after the last pass, further ones with crops_per_image crops each."""
        if getattr(self.trainer, "reload_dataloaders_every_n_epochs", 1) != 1:
            raise QatError("trainer.reload_dataloaders_every_n_epochs must be 1: each pass has a loader of its own")
        self._epoch = epoch = self.trainer.current_epoch if self.trainer is not None else 0
        images = self._split("train", self._training_view(epoch), TRIES[self.options.on_bad_image], self._trained())
        order = shuffled(len(images), self.seed, epoch, *self._rank())
        done = batches_done(with_list(self._resumed, self.tree.source("train")), epoch, self._order(epoch))
        sampler = ResumableBatchSampler(order, self.batch_size // self._crops(epoch), done)
        return load(images, self.workers, batch_sampler=sampler)

    def _training_view(self, epoch: int) -> View:
        """The stored crops and their labels if there are soft labels, otherwise new random crops."""
        size, how, crops = self._preprocessing().size, self.options.train_interpolation, self._crops(epoch)
        if self.store is None:
            return CropView(self.crop_distribution, size, how, crops, self.seed, epoch)
        before = sum(self._crops(earlier) for earlier in range(epoch))
        return ReplayView(self.store, self._trained(), size, how, crops, self.seed, before)

    def state_dict(self) -> dict[str, Any]:
        """The pass, its finished batches and what their order depends on, to resume in the middle of a pass."""
        if self._calibration_folder is not None:
            return {}  # there may be no training images, and nothing is trained that could resume
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        passes, batches = (
            part.state_dict()["current"] for part in (loop.epoch_progress, loop.epoch_loop.batch_progress)
        )
        progress = {"batches": batches["processed"], "finished": passes["processed"] == passes["ready"]}
        progress["passes"] = [self._crops(epoch) for epoch in range(self._epoch + 1)]
        return {"epoch": self._epoch, **progress, **self._order(self._epoch)}  # "completed" lags in a callback

    def _order(self, epoch: int) -> dict[str, Any]:
        """Everything that decides which images and crops are in which batch of a pass."""
        sizes = {"batch_size": self.batch_size, "crops": self._crops(epoch), "processes": self._rank()[1]}
        images = {"images": len(self._trained()), LIST: self.tree.source("train").listed}
        held_out = {"held_out": self.options.held_out}
        return sizes | {"seed": self.seed, **held_out, **images, "soft labels": str(self.store)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: `passes` continue those that were made, and the loader of the pass skips what is finished."""
        then, now = state_dict.get("held_out", 0), self.options.held_out
        if state_dict and then != now:
            raise QatError(
                f"data.held_out is {now}, but the run has held out {then} images and was trained on others: resume "
                "with that number"
            )
        self._resumed = state_dict

    def teardown(self, stage: str) -> None:
        """Log how many images were skipped, and drop the resumed state, which another run must not use."""
        self.unreadable.summarize()
        self._resumed = START

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Every validation image once, in order, spread over the ranks, in the evaluation transform.

        In training with ``held_out``, a second loader has the training images that are put aside.
        """
        view = EvalView(self._preprocessing())
        loader = self._evaluation(self._split("val", view))
        if not self.options.held_out or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return loader
        return [loader, self._evaluation(self._split("train", view, chosen=self._parts.held_out))]

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every image to predict once, in order, spread over the ranks; all labels are -1."""
        return self._evaluation(self._unlabelled(self._prediction_source()))

    @property
    def calibration_place(self) -> list[str]:
        """Where the images of a calibration come from, and what becomes of broken ones."""
        return [str(part) for part in (self.options.root, self._calibration_folder, self.options.on_bad_image)]

    def calibration_batches(self, images: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Batches uint8 (b, 3, S, S) of the evaluation transform, of images that `calibration_loader` chooses."""
        tries, folder = TRIES[self.options.on_bad_image], self._calibration_folder
        if folder is None:
            source = self._split("train", EvalView(self._preprocessing()), tries, self._parts.used)
        else:
            source = self._unlabelled(loose_source(folder), tries)
        batches = calibration_loader(source, images, batch_size, seed, self.workers)
        return (self.unreadable.report_training(batch).images for batch in batches)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Report unreadable images in the main process: QatError, or a warning with ``on_bad_image: skip``."""
        training = self.trainer is not None and self.trainer.training
        return self.unreadable.report_training(batch) if training else self.unreadable.report(batch)

    def _split(self, name: str, view: View, tries: int = 1, chosen: Indices | None = None) -> Images:
        source = self.tree.source(name)
        return Images(source, self._classes.of(source), view, tries, chosen, bool(self.options.exif_orientation))

    def _unlabelled(self, source: Source, tries: int = 1) -> Images:
        upright = self.options.exif_orientation is not False
        return Images(source, None, EvalView(self._preprocessing()), tries, upright=upright)

    def _evaluation(self, images: Images) -> DataLoader[Batch]:
        rank, world_size = self._rank()
        return load(images, self.workers, batch_size=self.val_batch_size, sampler=range(rank, len(images), world_size))

    def _crops(self, epoch: int) -> int:
        return self.passes[epoch] if epoch < len(self.passes) else self.options.crops_per_image

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _preprocessing(self) -> Preprocessing:
        if self.options.preprocessing is None:
            raise QatError("data.preprocessing is not set: it takes the model's size, resize, interpolation, mean, std")
        try:
            return Preprocessing(**self.options.preprocessing)
        except TypeError as error:
            raise QatError(f"data.preprocessing is {self.options.preprocessing}: {error}") from error

    def _prediction_source(self) -> Source:
        images = self.options.images
        return self.tree.source("val") if images is None else loose_source(images)
