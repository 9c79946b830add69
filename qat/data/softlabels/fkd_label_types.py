"""The kinds of labels that FKD publishes. Shapes: M crops of an image, k stored classes per crop, C classes.

Class numbers are floats, as probabilities are. The shape of the labels goes with the label type of the set:

    hard                                 (M,) or (M, 1)        the most probable class
    smoothing                            (M, 2)                that class, its probability
    marginal_smoothing_k5, _k10          (M, 2, 5), (M, 2, 10) classes, their probabilities
    marginal_renorm, marginal_renorm_k5  (M, 2, 5)             the same
    ori                                  (M, C)                probabilities of all classes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qat.data.softlabels.store import HARD, HIGHEST_SUM, MARGINAL_RENORM, MARGINAL_SMOOTHING
from qat.errors import QatError

HALF_EXACT = 2048  # half precision represents every integer up to this one

Array = npt.NDArray[Any]


def _top_class(labels: Array, classes: int) -> tuple[Array, Array]:
    found = labels.reshape(len(labels), 1)
    return found, np.ones(found.shape)


def _class_probability_pairs(labels: Array, classes: int) -> tuple[Array, Array]:
    pairs = labels.reshape(len(labels), 2, -1)
    return pairs[:, 0], pairs[:, 1]


def _all_classes(labels: Array, classes: int) -> tuple[Array, Array]:
    return np.broadcast_to(np.arange(classes), labels.shape), labels


@dataclass(frozen=True)
class LabelType:
    """A kind of labels that FKD publishes, and how it is stored.

    Args:
        stored_as: label type of the store.
        top_k: k, or 0 for C.
        shapes: allowed shapes of the labels of a crop; 0 stands for C.
        split: turns (labels, C) into classes (M, k) and probabilities (M, k).
    """

    stored_as: str
    top_k: int
    shapes: tuple[tuple[int, ...], ...]
    split: Callable[[Array, int], tuple[Array, Array]]

    def sparse(self, labels: Array, classes: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]:
        """Classes and probabilities (M, k), most probable first; QatError for labels of another type."""
        shapes = [(len(labels), *(size or classes for size in shape)) for shape in self.shapes]
        if labels.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise QatError(f"its labels are {labels.shape}, expected {expected}: give the label_type of the set")
        found, probs = self.split(labels, classes)
        numbers, probs = _class_numbers(found, classes), probs.astype(np.float64)
        if not (probs >= 0).all() or not ((sums := probs.sum(1)) > 0).all() or (sums > HIGHEST_SUM).any():
            raise QatError("its labels are not probabilities, which are at least 0 and sum to at most 1")
        order = np.argsort(-probs, axis=1, kind="stable")
        return np.take_along_axis(numbers, order, 1), np.take_along_axis(probs, order, 1).astype(np.float16)


LABEL_TYPES = {
    "marginal_smoothing_k5": LabelType(MARGINAL_SMOOTHING, 5, ((2, 5),), _class_probability_pairs),
    "marginal_smoothing_k10": LabelType(MARGINAL_SMOOTHING, 10, ((2, 10),), _class_probability_pairs),
    "marginal_renorm": LabelType(MARGINAL_RENORM, 5, ((2, 5),), _class_probability_pairs),
    "marginal_renorm_k5": LabelType(MARGINAL_RENORM, 5, ((2, 5),), _class_probability_pairs),
    "smoothing": LabelType(MARGINAL_SMOOTHING, 1, ((2,),), _class_probability_pairs),
    "hard": LabelType(HARD, 1, ((), (1,)), _top_class),
    "ori": LabelType(MARGINAL_SMOOTHING, 0, ((0,),), _all_classes),
}


def _class_numbers(found: Array, classes: int) -> npt.NDArray[np.uint16]:
    """Class numbers as integers; QatError for a number that is no class, and for a class that a crop has twice."""
    if found.dtype == np.float16 and classes > HALF_EXACT + 1:
        raise QatError(
            f"its class numbers are float16, exact up to {HALF_EXACT}, of {classes} classes: make it in float32"
        )
    numbers = np.sort(found.astype(np.float64), 1)  # half precision would compare with a rounded C
    bad = ~((numbers >= 0) & (numbers < classes) & (numbers == np.rint(numbers)))
    if bad.any():
        raise QatError(f"class {numbers[bad][0]} is not in 0..{classes - 1}: are label_type and data.root right?")
    if (numbers[:, 1:] == numbers[:, :-1]).any():
        raise QatError("a crop has the same class twice: replace the file")
    return found.astype(np.uint16)
