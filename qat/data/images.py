"""From image files to batches. Shapes: B views in a batch, m per image, S their side; H, W pixels of an image.

A worker makes whole batches and writes every view to its place in memory that it shares with the main process: each
pixel is copied once. An image that cannot be read is reported in the batch and raises nothing: an exception in a worker
would reach the user as a traceback without the path. The main process decides what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.crops import CropDistribution, draw, replay
from qat.data.decode import new_images, read_image, reason, to_image, to_tensor
from qat.data.source import Source
from qat.data.streams import rng_for
from qat.data.worker import leave_signals_to_the_main_process, let_other_threads_finish, signals_held_back
from qat.errors import QatError
from qat.preprocessing import Preprocessing


class TopK(NamedTuple):
    """Sparse soft labels: what the probabilities lack of 1 is spread evenly over the other classes.

    This is the marginal smoothing of FKD (Shen and Xing, ECCV 2022).
    """

    classes: Tensor  # (B, k) int64
    probs: Tensor  # (B, k) float32, a row sums to at most 1


class View(Protocol):
    """Makes the m views of an image that a model sees."""

    @property
    def count(self) -> int:
        """Number m of views per image."""

    @property
    def size(self) -> int:
        """Side S of a view, pixels."""

    def __call__(self, image: Tensor, index: int, out: Tensor) -> TopK | None:
        """Write the views of an RGB image uint8 (3, H, W) to ``out`` (m, 3, S, S); return their soft labels, if any."""


class Batch(NamedTuple):
    """One batch of views; an evaluation batch can be empty (B = 0) when unreadable images are skipped.

    The m views of an image are neighbours, so row i belongs to ``paths[i // m]``.
    """

    images: Tensor  # (B, 3, S, S) uint8
    labels: Tensor  # (B,) int64, -1 when unknown (prediction)
    paths: tuple[str, ...]  # one per image, relative to its folder
    bad: tuple[str, ...]  # one message for every file of this batch that could not be read
    soft_labels: TopK | None = None  # replace the labels in the loss
    fatal: str = ""  # an error that stops the run even if unreadable images are skipped
    notes: tuple[str, ...] = ()  # on images of which only a part was used


@dataclass(frozen=True)
class EvalView:
    """The view of published results: Pillow resizes the short side to ``resize``, then the centre is cut out."""

    preprocessing: Preprocessing
    count = 1

    @property
    def size(self) -> int:
        """Side S of the view, pixels."""
        return self.preprocessing.size

    def __call__(self, image: Tensor, index: int, out: Tensor) -> None:
        """Write the view of one RGB image; the index is not used."""
        whole, size = to_image(image), self.preprocessing.size
        short = min(whole.size)
        width, height = (int(self.preprocessing.resize * side / short) for side in whole.size)  # truncates: torchvision
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = whole.resize((width, height), Image.Resampling[self.preprocessing.interpolation.upper()])
        out[0] = to_tensor(resized.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class CropView:
    """``count`` random crops of an image, a function of (seed, epoch, index) alone."""

    distribution: CropDistribution
    size: int
    interpolation: str
    count: int
    seed: int
    epoch: int

    def __call__(self, image: Tensor, index: int, out: Tensor) -> None:
        """Write the m crops of one RGB image."""
        rng, (_, height, width) = rng_for(self.seed, self.epoch, index), image.shape
        crops = [draw(self.distribution, height, width, rng) for _ in range(self.count)]
        replay(image, crops, self.size, self.interpolation, out)


class Images(Dataset[Batch]):
    """Images of a source, in batches; each is decoded once for all of its views.

    Args:
        source: the images.
        labels: the label of every image of the source; -1 for all where it is None.
        view: makes the views of a decoded image.
        tries: how many files are tried for one index: the file itself, then those that follow it in the list.
        chosen: numbers of the images in the source that an index counts; all when None.
        upright: turn images as the orientation in their EXIF says.
    """

    def __init__(
        self, source: Source, labels: Sequence[int] | None, view: View, tries: int = 1,
        chosen: npt.NDArray[np.int64] | None = None, upright: bool = False,
    ):  # fmt: skip
        self.source, self.view, self.upright = source, view, upright
        self.labels = np.full(len(source), -1) if labels is None else np.asarray(labels, np.int64)
        self.chosen = np.arange(len(source)) if chosen is None else chosen
        self.tries = min(tries, len(self.chosen))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these indices; images that cannot be read, or must not be trained on, leave a message only."""
        try:
            return self._batch(indices)
        except QatError as error:
            return Batch(new_images(0, self.view.size), torch.empty(0, dtype=torch.int64), (), (), fatal=str(error))

    def _batch(self, indices: Sequence[int]) -> Batch:
        m, S = self.view.count, self.view.size
        images = new_images(len(indices) * m, S)
        numbers: list[int] = []
        soft: list[TopK] = []
        bad: list[str] = []
        notes: list[str] = []
        for index in indices:
            for place in ((index + offset) % len(self.chosen) for offset in range(self.tries)):
                number = int(self.chosen[place])
                try:
                    image, note = read_image(self.source.open(number), self.upright)
                except Exception as error:  # Pillow has no common base: OSError, SyntaxError, ValueError, ...
                    bad.append(f"{self.source.path(number)}: {reason(error)}")
                    continue
                labels = self._views(image, place, images[len(numbers) * m :][:m])
                numbers.append(number)
                soft += [] if labels is None else [labels]
                notes += [f"{self.source.path(number)} {note}"] if note else []
                break
        paths = tuple(self.source.names[number] for number in numbers)
        labels_of = torch.from_numpy(self.labels[numbers]).repeat_interleave(m)
        stored = TopK(*(torch.cat(parts) for parts in zip(*soft, strict=True))) if soft else None
        return Batch(images[: len(paths) * m], labels_of, paths, tuple(bad), stored, notes=tuple(notes))

    def _views(self, image: Tensor, place: int, out: Tensor) -> TopK | None:
        """Add the path to the error of an image whose soft labels were made on another image."""
        try:
            return self.view(image, place, out)
        except QatError as error:
            raise QatError(f"{self.source.path(int(self.chosen[place]))}: {error}") from None


def as_it_is(batch: Batch) -> Batch:
    """Replaces the collation of the loader, because `Images` makes whole batches."""
    return batch


class Loader(DataLoader[Batch]):
    """A loader with an empty state: Lightning warns about loaders without one when a run is resumed.

    Where to resume is in the state of the data module.
    """

    def __iter__(self) -> Any:
        """Start the workers, in a moment in which a fork is safe."""
        if not self.num_workers:
            return super().__iter__()
        let_other_threads_finish()
        with signals_held_back():
            return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return the empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the empty state."""


def load(images: Images, workers: int, **batching: Any) -> Loader:
    """Batches of images, decoded in workers.

    Args:
        images: what to load.
        workers: processes that decode; PyTorch sets one thread in each.
        **batching: sampler and size of a batch, as PyTorch's loader takes them.
    """
    return Loader(
        images,
        num_workers=workers,
        collate_fn=as_it_is,  # type: ignore[arg-type]
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # otherwise every loader advances the global generator by one number
        **batching,
    )
