"""Hugging Face data sets, by timm's own reader (``data.root: hfds/PATH``, as in timm).

PATH is a folder, also one that ``save_to_disk`` wrote, or a name on the Hub. The package ``datasets`` is needed.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from qat.data.folder import are_numbers
from qat.data.source import Source
from qat.errors import QatError, first_line

log = logging.getLogger(__name__)
INSTEAD = ("test",)  # evaluated where a data set has no validation split


@dataclass(frozen=True, eq=False)
class HubSource(Source):
    """Rows of a Hugging Face data set.

    Args:
        rows: the data set, whose images are not decoded.
        column: name of the column of images.
    """

    rows: Any = None
    column: str = "image"

    def open(self, index: int) -> BinaryIO:
        """The content of an image."""
        image = self.rows[index][self.column]
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        return open(image["path"], "rb")


@cache
def hub_source(name: Path, splits: tuple[str, ...]) -> HubSource:
    """The images of the first of these splits that the data set has.

    Raises:
        QatError: the package is missing, or the data set has no such split, or no images with classes.
    """
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise QatError(f"data.root is hfds/{name}, which needs a package: pip install datasets") from None
    path = next((str(path) for path in (name, Path("/", name)) if path.is_dir()), str(name))
    try:
        rows, split = _open(datasets, path, splits)
        image, label = _columns(datasets, rows, path)
        rows = rows.cast_column(image, datasets.Image(decode=False))
        names = [name.replace("/", "_") for name in getattr(rows.features[label], "names", None) or ()]
        keys = _keys(names, list(rows[label]), path)
    except QatError:
        raise
    except Exception as error:  # the package raises what it likes
        raise QatError(f"data.root: cannot read the data set hfds/{name}: {first_line(error)}") from None
    width = len(str(len(keys)))
    return HubSource(
        Path("hfds", name, split),
        tuple(f"{key}/{index:0{width}}" for index, key in enumerate(keys)),
        keys,
        numbered=not names and are_numbers(set(keys)),
        classes=names,
        rows=rows,
        column=image,
    )


def _open(datasets: Any, path: str, splits: Sequence[str]) -> tuple[Any, str]:
    """The rows of a split and its name."""
    if Path(path, "dataset_dict.json").is_file():  # timm's reader does not read what save_to_disk wrote
        saved = datasets.load_from_disk(path)
        split = _choose(path, splits, list(saved))
        return saved[split], split
    from timm.data.readers.reader_hfds import ReaderHfds

    split = _choose(path, splits, datasets.get_dataset_split_names(path))
    kind = datasets.load_dataset_builder(path).info.features or {}
    image = next((name for name, feature in kind.items() if isinstance(feature, datasets.Image)), "image")
    return ReaderHfds(path, split=split, input_key=image).dataset, split


def _choose(path: str, splits: Sequence[str], found: Sequence[str]) -> str:
    """The first of several names of a split that exists."""
    wanted: list[str] = [*splits, *(INSTEAD if "val" in splits else ())]
    for split in wanted:
        if split in found:
            if split in INSTEAD:
                log.warning("hfds/%s has no validation split: %r is evaluated", path, split)
            return split
    raise QatError(f"data.root: hfds/{path} has the splits {', '.join(found)}, none of {', '.join(wanted)}")


def _keys(names: Sequence[str], labels: Sequence[Any], path: str) -> tuple[str, ...]:
    """The class of every row: the name that the column gives its label, or the label where it gives none."""
    if not names:
        return tuple(str(label) for label in labels)
    if lacking := [row for row, label in enumerate(labels) if label is None or not 0 <= label < len(names)]:
        raise QatError(f"data.root: row {lacking[0]} of hfds/{path} has no class, and so have {len(lacking) - 1} more")
    return tuple(names[label] for label in labels)


def _columns(datasets: Any, rows: Any, path: str) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    kinds = rows.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels") if name in kinds and name not in labels]
    if not images or not labels:
        what = "images" if not images else "classes"
        raise QatError(f"data.root: hfds/{path} has no column of {what}, only {', '.join(kinds)}")
    return str(images[0]), str(labels[0])
