"""Training on stored soft labels: which crops of an image come next, and what their labels are.

Shapes: M stored crops of an image, m of them chosen, k stored classes, S side of a view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qat.data.crops import replay
from qat.data.images import TopK
from qat.data.softlabels.reader import SoftLabels, check_size
from qat.data.softlabels.store import HARD, MARGINAL_RENORM, Header
from qat.data.streams import rng_for


def next_crops(seed: int, index: int, crops: int, before: int, count: int) -> npt.NDArray[np.int64]:
    """Numbers of the crops of an image that are used after the first ``before`` of them.

    Every crop is used once, in a random order that depends on (seed, index), before any is used again in another order.

    Args:
        seed: of the orders.
        index: number of the image.
        crops: M, all crops of the image.
        before: how many were used already, over all orders.
        count: m, how many to return.
    """
    turn, place = divmod(before, crops)
    found = rng_for(seed, turn, index).permutation(crops)[place : place + count]
    if len(found) == count:
        return found
    rest = next_crops(seed, index, crops, before + len(found), count - len(found))
    return np.concatenate([found, rest])


def recover(header: Header, classes: npt.NDArray[np.uint16], probs: npt.NDArray[np.float16]) -> TopK:
    """Turn stored classes and probabilities (m, k) into labels for the loss, according to the label type."""
    values = torch.from_numpy(probs.astype(np.float32))
    if header.label_type == HARD:
        values = torch.ones_like(values)
    elif header.label_type == MARGINAL_RENORM:
        values = values / values.sum(1, keepdim=True)
    return TopK(torch.from_numpy(classes.astype(np.int64)), values)


@dataclass(frozen=True, eq=False)
class ReplayView:
    """Replays the next m stored crops of an image; which ones depends on (seed, image, crops used before) alone.

    Args:
        labels: the store.
        rows: number in the store of every image that is trained on.
        size: S, side of the views that the student sees, pixels.
        interpolation: how crops are resized.
        count: m.
        seed: fixes the order in which the crops of an image are used.
        before: how many crops of every image earlier passes have used.
    """

    labels: SoftLabels
    rows: npt.NDArray[np.int64]
    size: int
    interpolation: str
    count: int
    seed: int
    before: int

    def __call__(self, image: Tensor, index: int, out: Tensor) -> TopK:
        """Write the crops of one RGB image; QatError when its labels were made on an image of another size."""
        number, header = int(self.rows[index]), self.labels.header
        crops = next_crops(self.seed, number, header.num_crops, self.before, self.count)
        labels = self.labels.read(number, crops)
        check_size(labels.image_size, (image.shape[1], image.shape[2]))
        labels.check(header.num_classes)
        replay(image, labels.crops(), self.size, self.interpolation, out)
        return recover(header, labels.classes, labels.probs)
