"""What units read and give, for all images: in the memory of the device, or where there is more room.

The inputs and outputs of a unit for all images can be more than memory holds. Beyond a limit they are kept in the
memory of the host if the device has its own, else in a file; batches come back to the device one by one.
Shapes: n images, B of a batch.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from qat.errors import QatError
from qat.sites.family import Unit

log = logging.getLogger(__name__)
GB = 1e9  # bytes
Picks = int | slice | Tensor


class Rows:
    """A tensor (n, ...) of all images, some of which can be picked.

    Args:
        storage: of any place.
        device: that of the rows which are picked.
    """

    def __init__(self, storage: Tensor, device: torch.device) -> None:
        self.storage, self.device = storage, device

    def __len__(self) -> int:
        return len(self.storage)

    def __getitem__(self, picks: Picks) -> Tensor:
        """Some images (B, ...), on the device."""
        picks = picks.to(self.storage.device) if isinstance(picks, Tensor) else picks
        return self.storage[picks].to(self.device)


class Batches(Sequence[Tensor]):
    """The same as batches (B, ...).

    Args:
        rows: of all images.
        sizes: B of every batch.
    """

    def __init__(self, rows: Rows, sizes: Sequence[int]) -> None:
        self.rows, self.sizes = rows, sizes
        self._ends = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | list[Tensor]:
        """A batch, or some of them."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self.rows[self._ends[i] : self._ends[i + 1]]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


@dataclass
class Cache:
    """Keeps batches.

    Args:
        gigabytes: for all of them together; None for no limit.
        folder: of files; None for the one for temporary files.
    """

    gigabytes: float | None = None
    folder: Path | None = None
    full: bool = False

    def plan(self, units: Sequence[Unit], image: Tensor, images: int, copies: int) -> None:
        """Measure what a calibration needs on one image (1, 3, S, S), say so, and decide where it is kept.

        Args:
            units: of the model, in floating point.
            image: normalized, on the device.
            images: n.
            copies: 2 where the float model is kept beside the quantized one, else 1.
        """
        sizes = [image.nbytes]
        for unit in units:
            image = unit.run(image)
            sizes.append(image.nbytes)
        need = images * copies * max(a + b for a, b in pairwise(sizes)) / GB
        self.full = self.gigabytes is not None and need > self.gigabytes
        if need >= 0.5 or self.full:
            place = "in memory"
            if self.full:
                place = "in memory of the host" if image.device.type != "cpu" else "in files, for calibration.cache_gb"
                place += f" is {self.gigabytes:g}"
            log.info("inputs and outputs of a unit, for %d images, take %.1f GB, %s", images, need, place)

    def keep(self, batches: Iterable[Tensor], sizes: Sequence[int]) -> Batches:
        """Copy batches (B, ...) of known sizes."""
        storage: Tensor | None = None
        end, device = 0, torch.device("cpu")
        for batch in batches:
            if storage is None:
                device, storage = batch.device, self._storage((sum(sizes), *batch.shape[1:]), batch)
            storage[end : end + len(batch)] = batch
            end += len(batch)
        assert storage is not None, "there is at least one batch"
        return Batches(Rows(storage, device), sizes)

    def _storage(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if not self.full:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        if like.device.type != "cpu":
            return torch.empty(shape, dtype=like.dtype)
        count = torch.Size(shape).numel()
        size = max(1, count * like.element_size())
        try:
            file = tempfile.NamedTemporaryFile(dir=self.folder, prefix="qat_cache_")  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, and not as a bus error
            else:
                file.truncate(size)
        except OSError as error:
            raise QatError(
                f"cannot keep {size / GB:.1f} GB in {self.folder or tempfile.gettempdir()}: {error.strerror}; make "
                "space, or raise calibration.cache_gb, which keeps it in memory"
            ) from None
        with file:  # lives on until it is unmapped
            return torch.from_file(file.name, shared=True, size=count, dtype=like.dtype).view(shape)
