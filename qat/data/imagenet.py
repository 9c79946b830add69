"""ImageNet, or any class-folder tree, as uint8 batches. Shapes: B crops in a batch, S their side, pixels."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qat.data.check import at_least, cores
from qat.data.crops import CropLaw
from qat.data.folder import class_names, class_names_of, find_images, find_loose_images
from qat.data.images import Batch, CropView, EvalView, Images, Loader, View, as_it_is
from qat.data.options import DataOptions
from qat.data.order import Batches, batches_done, batches_per_pass, crop_passes, shuffled
from qat.data.softlabels.reader import ReplayView, SoftLabels
from qat.data.streams import rng_for
from qat.errors import QatError
from qat.preprocessing import Preprocessing

__all__ = ["Batch", "ImageNetDataModule"]
log = logging.getLogger(__name__)
TRIES = {"error": 1, "skip": 100}  # files tried for one training sample; more bad ones in a row is a broken disk


class ImageNetDataModule(L.LightningDataModule):
    """Training crops, evaluation views and calibration images of a folder tree."""

    def __init__(self, options: DataOptions) -> None:
        super().__init__()
        self.options = options
        self.root, self.images = options.root, options.images
        self.val_batch_size = options.batch_size if options.val_batch_size is None else options.val_batch_size
        self.workers = min(cores(), 8) if options.workers is None else options.workers
        self.seed = options.seed or 0
        self.law = CropLaw(**options.given_law)
        self.bad_images: Counter[str] = Counter()  # "path: reason" -> how often it was met
        self._epoch, self._resumed = 0, {"epoch": 0, "batches": 0}

    @property
    def classes(self) -> list[str]:
        """Class names in label order; QatError if root is not set or its folders do not match."""
        root = self._root()
        return class_names_of(root) if (root / "train").is_dir() else class_names(root / "val")

    @property
    def num_classes(self) -> int:
        """Number of classes: 1,000 for ImageNet even when only some of its folders exist."""
        return len(self.classes)

    @property
    def passes(self) -> list[int]:
        """Crops per image in each pass over the images; its length is the number of Trainer epochs."""
        return crop_passes(self.options.crop_epochs, self.options.crops_per_image)

    def batches_per_pass(self, world_size: int = 1, epochs: int | None = None) -> list[int]:
        """Training steps, on each of ``world_size`` processes, of the first ``epochs`` passes (of all when None)."""
        passes = self.passes if epochs is None else [self._crops(epoch) for epoch in range(epochs)]
        return batches_per_pass(len(self._trained()), self.options.batch_size, passes, world_size)

    @cached_property
    def store(self) -> SoftLabels | None:
        """The soft labels; QatError when they are of other images than those of training, or of another crop law."""
        if self.options.softlabels is None:
            return None
        folder, law = self._root() / "train", self.options.given_law
        store = SoftLabels.of(self.options.softlabels, folder, self.classes, law, self.options.softlabels_partial)
        log.info("soft labels of %s", store)
        return store

    def _trained(self) -> npt.NDArray[np.int64]:
        """Numbers of the images that are trained on: all, or those of an unfinished store that have labels."""
        if self.store is not None:
            return np.flatnonzero(self.store.done)
        return np.arange(len(find_images(self._root() / "train")))

    def setup(self, stage: str) -> None:
        """Lists the folders that the stage reads, and checks them and the preprocessing: QatError if unusable."""
        self._preprocessing()
        if stage == "predict":
            find_loose_images(self._prediction_folder())
            return
        if stage == "fit":
            self._trained()
        find_images(self._root() / "val")
        log.info("%d classes in %s", self.num_classes, self.root)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The pass ``trainer.current_epoch``; past the last pass, more of crops_per_image each."""
        if getattr(self.trainer, "reload_dataloaders_every_n_epochs", 1) != 1:
            raise QatError("trainer.reload_dataloaders_every_n_epochs must be 1: each pass has a loader of its own")
        self._epoch = epoch = self.trainer.current_epoch if self.trainer is not None else 0
        images = self._split("train", self._training_view(epoch), TRIES[self.options.on_bad_image], self._trained())
        order = shuffled(len(images), self.seed, epoch, *self._rank())
        done = batches_done(self._resumed, epoch, self._order(epoch))
        return self._loader(images, batch_sampler=Batches(order, self.options.batch_size // self._crops(epoch), done))

    def _training_view(self, epoch: int) -> View:
        """Stored crops where there are soft labels, else new ones."""
        size, how, crops = self._preprocessing().size, self.options.train_interpolation, self._crops(epoch)
        if self.store is None:
            return CropView(self.law, size, how, crops, self.seed, epoch)
        before = sum(self._crops(earlier) for earlier in range(epoch))
        return ReplayView(self.store, self._trained(), size, how, crops, self.seed, before)

    def state_dict(self) -> dict[str, Any]:
        """The pass and how many of its batches are done, for a run that is resumed in the middle of a pass."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]
        done = progress["processed"]  # "completed" lags when saved in a callback
        return {"epoch": self._epoch, "batches": done, **self._order(self._epoch)}

    def _order(self, epoch: int) -> dict[str, Any]:
        """What the order of a pass and its batches depend on."""
        sizes = {"batch_size": self.options.batch_size, "crops": self._crops(epoch), "processes": self._rank()[1]}
        return sizes | {"seed": self.seed, "images": len(self._trained()), "soft labels": str(self.store)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next loader of that pass leave out the batches that are done."""
        self._resumed = state_dict

    def teardown(self, stage: str) -> None:
        """Sums up the images that were skipped; forgets what was resumed: the next run starts its passes anew."""
        if self.bad_images:
            log.warning("%d unreadable images, skipped %d times", len(self.bad_images), self.bad_images.total())
        self._resumed = {"epoch": 0, "batches": 0}

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation image once, in order, spread over the ranks; evaluation transform."""
        return self._evaluation(self._split("val", EvalView(self._preprocessing())))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every image of the prediction folder once, in order, spread over the ranks; all labels are -1."""
        folder = self._prediction_folder()
        view = EvalView(self._preprocessing())
        return self._evaluation(Images(folder, find_loose_images(folder), {}, view))

    def calibration_batches(self, images: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        """uint8 (b, 3, S, S) of a seeded random subset of the training images, the same on every rank.

        They go through the evaluation transform; QatError if there are fewer than ``images`` of them.
        """
        source = self._split("train", EvalView(self._preprocessing()), TRIES[self.options.on_bad_image])
        if not 0 < images <= len(source):
            raise QatError(
                f"calibration.images is {images}: {self.root}/train has {len(source)}, choose 1..{len(source)}"
            )
        chosen = rng_for(at_least("calibration seed", seed, 0), 0, 0).permutation(len(source))[:images]
        batches = Batches(chosen, at_least("calibration batch_size", batch_size, 1))
        return (self._filled(self._report(batch)).images for batch in self._loader(source, batch_sampler=batches))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Reports unreadable images in the main process: QatError, or a warning with ``on_bad_image: skip``."""
        batch = self._report(batch)
        return self._filled(batch) if self.trainer is not None and self.trainer.training else batch

    def _report(self, batch: Batch) -> Batch:
        if batch.fatal:
            raise QatError(batch.fatal)
        if batch.bad and self.options.on_bad_image == "error":
            raise QatError(f"cannot read {batch.bad[0]}; repair it, or set data.on_bad_image: skip")
        for message in batch.bad:
            if message not in self.bad_images:
                log.warning("skipped %s", message)
            self.bad_images[message] += 1
        return batch

    def _filled(self, batch: Batch) -> Batch:
        if not len(batch.images):
            raise QatError(f"a whole batch of {self.root}/train cannot be read, first {batch.bad[0]}")
        return batch

    def _split(self, name: str, view: View, tries: int = 1, chosen: npt.NDArray[np.int64] | None = None) -> Images:
        folder = self._root() / name
        labels, paths = {name: label for label, name in enumerate(self.classes)}, find_images(folder)
        return Images(folder, paths if chosen is None else [paths[i] for i in chosen], labels, view, tries)

    def _evaluation(self, images: Images) -> DataLoader[Batch]:
        rank, world_size = self._rank()
        return self._loader(images, batch_size=self.val_batch_size, sampler=range(rank, len(images), world_size))

    def _loader(self, images: Images, **batching: Any) -> DataLoader[Batch]:
        return Loader(
            images,
            num_workers=self.workers,  # PyTorch sets one thread in each
            collate_fn=as_it_is,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise every loader advances the global generator by one number
            **batching,
        )

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

    def _root(self) -> Path:
        if self.root is None:
            raise QatError("data.root is not set: expected a folder with train/<class>/*.JPEG and val/<class>/*.JPEG")
        return self.root

    def _prediction_folder(self) -> Path:
        return self._root() / "val" if self.images is None else self.images
