"""A source of images: what they are called, which classes they have, and how each is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, eq=False)
class Source:
    """Images in files below a folder; subclasses keep them elsewhere.

    Args:
        place: the folder, or the file that holds all images; for messages.
        names: the images, relative to the place; none occurs twice.
        keys: the class of every image, as its folder or its label file calls it; empty where classes are unknown.
        numbered: the keys are labels rather than names of classes.
        classes: all classes in the order of their labels, where the source has such an order.
    """

    place: Path
    names: Sequence[str]
    keys: Sequence[str] = ()
    numbered: bool = False
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def listed(self) -> str:
        """What tells this list of images from another one."""
        return list_of(self.names)

    def path(self, index: int) -> Path:
        """Where an image is, for messages."""
        return self.place / self.names[index]

    def open(self, index: int) -> Path | BinaryIO:
        """The file of an image, or its content."""
        return self.path(index)


def list_of(names: Sequence[str]) -> str:
    """The first and the last name, and a hash of all names, in order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\n")
    return f"{names[0]!r} to {names[-1]!r}, {digest.hexdigest()[:16]}"
