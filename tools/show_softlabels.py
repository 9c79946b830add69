"""What a store of soft labels says of one image: its crops, as a student sees them, and their most probable classes.

python tools/show_softlabels.py labels.h5 --data.root /path/to/imagenet [--image N_OR_PATH] [--crops 6]
       --output picture.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from qat.data.crops import Crop, replay
from qat.data.decode import decode, reason
from qat.data.folder import class_names, find_images, wnids
from qat.data.labelreader import SoftLabels, check_size, recover
from qat.data.softlabels import Row
from qat.errors import QatError

SIZE = 224  # side of a crop, pixels
TOP = 5
NAME = 30  # characters of a class name that fit beside its probability
COLUMNS = 2  # of crops
CELL = (4.9, 1.95)  # inches of a crop with its bars
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#7b3fb5", "#c0202c", "#2f9fd0")
MIRRORED = "\N{RIGHTWARDS ARROW OVER LEFTWARDS ARROW}"
GREY = "#555555"
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Shown:
    """A crop and its labels."""

    number: int  # from 1
    crop: Crop
    pixels: Tensor  # (3, SIZE, SIZE) uint8
    labels: list[tuple[str, float]]  # class and probability, most probable first

    @property
    def colour(self) -> str:
        """Of its box and its bars."""
        return COLOURS[(self.number - 1) % len(COLOURS)]

    @property
    def title(self) -> str:
        """Its number, with a mark if it is mirrored."""
        return f"{self.number} {MIRRORED}" if self.crop.flip else str(self.number)


@dataclass(frozen=True)
class Scene:
    """An image and what a store says of it."""

    path: str
    pixels: Tensor  # (3, H, W) uint8
    true: str  # class
    store: str
    crops: list[Shown]


def described(name: str) -> str:
    """A class in words: the first synonym of an ImageNet class, the name of another."""
    words = ImageNetInfo().label_name_to_description(name).partition(",")[0] if name in wnids() else name
    return words if len(words) <= NAME else words[: NAME - 1].rstrip() + "…"


def find(asked: str | None, folder: Path, paths: Sequence[str], labels: SoftLabels) -> int:
    """The number of an image; the first that has labels when none is asked for; QatError if there is no such image."""
    if asked is None:
        return int(labels.done.argmax())
    if asked.isdecimal() and int(asked) < len(paths):
        return int(asked)
    path = Path(asked)
    names = [path.as_posix()]
    if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
        names.append(path.resolve().relative_to(folder.resolve()).as_posix())
    for name in names:
        if name in paths:
            return paths.index(name)
    raise QatError(f"image is {asked!r}: give a number, 0..{len(paths) - 1}, or a path such as {folder / paths[0]}")


def look(store: Path, root: Path, image: str | None, count: int) -> Scene:
    """Read an image and the labels of its first crops; QatError for a store that is of other images."""
    labels, folder = SoftLabels(store), root / "train"
    paths, classes = find_images(folder), class_names(folder)
    labels.check_images(folder, paths, classes)
    labels.check_finished(partial=True)
    if not 1 <= count <= labels.header.num_crops:
        raise QatError(f"crops is {count}: choose 1..{labels.header.num_crops}, which {store} has of an image")
    index = find(image, folder, paths, labels)
    row, path = labels.row(index), folder / paths[index]
    row.check(labels.header.num_classes)
    try:
        pixels = decode(path)
    except Exception as error:  # Pillow has no common base
        raise QatError(f"cannot read {path}: {reason(error)}; choose another image") from None
    check_size(row.image_size, (pixels.shape[1], pixels.shape[2]), f"{path}: ")
    crops = shown(pixels, row.take(np.arange(count)), labels, classes)
    return Scene(paths[index], pixels, described(paths[index].partition("/")[0]), str(labels), crops)


def shown(pixels: Tensor, row: Row, labels: SoftLabels, classes: Sequence[str]) -> list[Shown]:
    """The crops of a row, replayed, with their labels as they are trained on."""
    boxes = zip(row.boxes.tolist(), row.flips.tolist(), strict=True)
    crops = [Crop(*box, flip) for box, flip in boxes]
    recovered = recover(labels.header, row.classes, row.probs)
    made = []
    for i, view in enumerate(replay(pixels, crops, SIZE, "bilinear")):
        top = zip(recovered.classes[i].tolist(), recovered.probs[i].tolist(), strict=True)
        named = [(described(classes[number]), prob) for number, prob in list(top)[:TOP]]
        made.append(Shown(i + 1, crops[i], view, named))
    return made


def tags(crops: Sequence[Crop], widths: Sequence[float], height: float, image: tuple[int, int]) -> list[Box]:
    """Where the numbers of boxes go: in a corner of the box, or along its upper edge, where no other number is."""
    placed: list[Box] = []
    for crop, width in zip(crops, widths, strict=True):
        rights = [crop.left + crop.width, *np.arange(crop.left + width, crop.left + crop.width, width / 2)]
        lefts = [crop.left, *(right - width for right in rights)]
        tops = [crop.top, crop.top + crop.height - height, *np.arange(crop.top, crop.top + crop.height, height)]
        places = [(left, top) for top in tops for left in lefts]
        inside = [(min(max(x, 0), image[1] - width), min(max(y, 0), image[0] - height)) for x, y in places]
        boxes = [(x, y, x + width, y + height) for x, y in inside]
        placed.append(next((box for box in boxes if not any(overlap(box, other) for other in placed)), boxes[0]))
    return placed


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share a point."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_image(axes: Any, scene: Scene, inches: float) -> None:
    """The image with the boxes of its crops, numbered; it is ``inches`` wide."""
    from matplotlib.patches import Rectangle

    _, height, width = scene.pixels.shape
    axes.imshow(scene.pixels.permute(1, 2, 0).numpy(), aspect="equal", interpolation="antialiased")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.axis("off")
    inch = width / inches  # pixels of the image
    sizes = [(0.42 if shown.crop.flip else 0.24) * inch for shown in scene.crops]
    places = tags([shown.crop for shown in scene.crops], sizes, 0.24 * inch, (height, width))
    for shown, (left, top, right, bottom) in zip(scene.crops, places, strict=True):
        crop, corner = shown.crop, (shown.crop.left - 0.5, shown.crop.top - 0.5)
        for colour, line in (("white", 3.6), (shown.colour, 2.0)):
            axes.add_patch(Rectangle(corner, crop.width, crop.height, fill=False, edgecolor=colour, linewidth=line))
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=shown.colour, zorder=3))
        middle = (left + right) / 2, (top + bottom) / 2
        axes.text(*middle, shown.title, color="white", weight="bold", fontsize=10, ha="center", va="center", zorder=4)


def draw_crop(view: Any, bars: Any, shown: Shown, true: str) -> None:
    """A crop and, beside it, its classes as bars with their names on them; the true class is bold."""
    view.imshow(shown.pixels.permute(1, 2, 0).numpy())
    view.set(xticks=[], yticks=[])
    for spine in view.spines.values():
        spine.set(color=shown.colour, linewidth=2.5)
    view.text(8, 8, shown.title, color="white", weight="bold", fontsize=10, va="top",
              bbox={"facecolor": shown.colour, "edgecolor": "none", "pad": 3})  # fmt: skip
    bars.set(xlim=(0, 1), ylim=(TOP - 0.5, -0.5))
    bars.axis("off")
    for place, (name, prob) in enumerate(shown.labels):
        weight = "bold" if name == true else "normal"
        bars.barh(place, 1, height=0.8, color="#f1f1f1")
        bars.barh(place, prob, height=0.8, color=shown.colour, alpha=0.38)
        bars.text(0.02, place, name, va="center", fontsize=9, weight=weight)
        bars.text(0.98, place, f"{100 * prob:.1f} %", va="center", ha="right", fontsize=9, weight=weight)


def draw(scene: Scene, output: Path) -> None:
    """Write the picture; QatError when that cannot be."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise QatError(f"the picture needs matplotlib ({error}): pip install 'qat[demo]'") from error
    rows = -(-len(scene.crops) // COLUMNS)
    _, height, width = scene.pixels.shape
    tall = max(rows, 2) * CELL[1]
    wide = min(max(tall * width / height, 3.5), 6.5)
    figure = pyplot.figure(figsize=(wide + COLUMNS * CELL[0], tall + 0.8))
    figure.text(0.5, 0.985, scene.true, fontsize=15, weight="bold", va="top", ha="center")
    figure.savefig(output, dpi=100)
    pyplot.close(figure)
