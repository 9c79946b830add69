"""ImageNet, or any class-folder tree, as uint8 batches. Shapes: b images in a batch, S their side in pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from qat.data.batch_size import split_global_batch
from qat.data.calibration import calibration_loader
from qat.data.check import cores
from qat.data.crops import CropDistribution
from qat.data.image_sets import ImageSets
from qat.data.images import Batch, CropView, Images, View, load
from qat.data.listing import LIST, with_list
from qat.data.options import DataOptions
from qat.data.order import ResumableBatchSampler, batches_done, batches_per_pass, longer_passes, shuffled
from qat.data.softlabels.replay import ReplayView
from qat.data.unreadable import UnreadableImages
from qat.errors import QatError

__all__ = ["Batch", "ImageNetDataModule"]
log = logging.getLogger(__name__)
START: dict[str, Any] = {"epoch": 0, "batches": 0, "passes": ()}  # state of a run that has not begun


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
        self.options, self.sets = options, ImageSets(options, classes or (), calibration_folder)
        self.workers = min(cores(), 8) if options.workers is None else options.workers
        self.seed = options.seed or 0
        self.crop_distribution = CropDistribution(**options.given_crop_options)
        self.unreadable = UnreadableImages(skip=options.on_bad_image == "skip")
        self.plan_batches(1, None)
        self._epoch, self._resumed = 0, START

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their labels; QatError if root is not set or there are no images."""
        return list(self.sets.classes.names)

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
        return batches_per_pass(len(self.sets.trained()), self.batch_size, passes, world_size)

    def setup(self, stage: str) -> None:
        """Check the folders that the stage reads, the preprocessing and the batch size; QatError if one is unusable."""
        self.sets.preprocessing()
        if stage == "fit" and self.trainer is not None and self.options.global_batch_size is not None:
            accumulate = self.plan_batches(self.trainer.world_size, self.trainer.accumulate_grad_batches)
            self.trainer.accumulate_grad_batches = accumulate
        if stage == "predict":
            self.sets.prediction_source()
            return
        if stage == "validate" and getattr(self.trainer, "limit_val_batches", 1) == 0:
            return  # a calibration that is not evaluated
        if stage == "fit":
            self.sets.trained()
        self.sets.classes.of(self.sets.tree.source("val"))
        log.info("%d classes in %s", self.num_classes, self.options.root)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The pass ``trainer.current_epoch``; after the last pass, further ones with crops_per_image crops each."""
        if getattr(self.trainer, "reload_dataloaders_every_n_epochs", 1) != 1:
            raise QatError("trainer.reload_dataloaders_every_n_epochs must be 1: each pass has a loader of its own")
        self._epoch = epoch = self.trainer.current_epoch if self.trainer is not None else 0
        images = self.sets.training(self._training_view(epoch))
        order = shuffled(len(images), self.seed, epoch, *self._rank())
        done = batches_done(with_list(self._resumed, self.sets.tree.source("train")), epoch, self._order(epoch))
        sampler = ResumableBatchSampler(order, self.batch_size // self._crops(epoch), done)
        return load(images, self.workers, batch_sampler=sampler)

    def _training_view(self, epoch: int) -> View:
        """The stored crops and their labels if there are soft labels, otherwise new random crops."""
        size, how, crops = self.sets.preprocessing().size, self.options.train_interpolation, self._crops(epoch)
        if self.sets.store is None:
            return CropView(self.crop_distribution, size, how, crops, self.seed, epoch)
        before = sum(self._crops(earlier) for earlier in range(epoch))
        return ReplayView(self.sets.store, self.sets.trained(), size, how, crops, self.seed, before)

    def state_dict(self) -> dict[str, Any]:
        """The pass, its finished batches and what their order depends on, to resume in the middle of a pass."""
        if self.sets.calibration_folder is not None:
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
        images = {"images": len(self.sets.trained()), LIST: self.sets.tree.source("train").listed}
        held_out = {"held_out": self.options.held_out}
        return sizes | {"seed": self.seed, **held_out, **images, "soft labels": str(self.sets.store)}

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
        loader = self._evaluation(self.sets.validation())
        if not self.options.held_out or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return loader
        return [loader, self._evaluation(self.sets.held_out())]

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every image to predict once, in order, spread over the ranks; all labels are -1."""
        return self._evaluation(self.sets.prediction())

    @property
    def calibration_place(self) -> list[str]:
        """Where the images of a calibration come from, and what becomes of broken ones."""
        return [str(part) for part in (self.options.root, self.sets.calibration_folder, self.options.on_bad_image)]

    def calibration_batches(self, images: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Batches uint8 (b, 3, S, S) of the evaluation transform, of images that `calibration_loader` chooses."""
        batches = calibration_loader(self.sets.calibration(), images, batch_size, seed, self.workers)
        return (self.unreadable.report_training(batch).images for batch in batches)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Report unreadable images in the main process: QatError, or a warning with ``on_bad_image: skip``."""
        training = self.trainer is not None and self.trainer.training
        return self.unreadable.report_training(batch) if training else self.unreadable.report(batch)

    def _evaluation(self, images: Images) -> DataLoader[Batch]:
        rank, world_size = self._rank()
        return load(images, self.workers, batch_size=self.val_batch_size, sampler=range(rank, len(images), world_size))

    def _crops(self, epoch: int) -> int:
        return self.passes[epoch] if epoch < len(self.passes) else self.options.crops_per_image

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
