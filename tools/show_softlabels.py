"""Draws an image, crops of it as a student sees them, and the most probable classes that a store has for them.

python tools/show_softlabels.py labels.h5 --data.root /path/to/imagenet --output picture.png [--image N_OR_PATH]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from qat.cli.scripts import Parser, run_script
from qat.data.classes import Tree
from qat.data.crops import Crop, replay
from qat.data.decode import decode, reason
from qat.data.folder import wnids
from qat.data.softlabels.reader import SoftLabels, check_size
from qat.data.softlabels.replay import recover
from qat.data.softlabels.store import ImageLabels
from qat.errors import QatError

CROPS, TOP, SIZE = 6, 5, 224  # at most: crops, classes of each; side of a crop, pixels
NAME = 30  # characters of a class name that fit on its bar
COLUMNS = 2  # of crops
MARGIN, HEAD, GAP = 0.25, 1.0, 0.2  # inches: margin of the picture, height of the title, space between parts
IMAGE, VIEW, BARS = 6.2, 1.75, 3.05  # inches: most of the image, side of a crop, width of its bars
TAG, WIDE_TAG = 0.24, 0.44  # inches: width of a number, and of a number with a mark
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#7b3fb5", "#c0202c", "#2f9fd0")
MIRRORED = "\N{RIGHTWARDS ARROW OVER LEFTWARDS ARROW}"
STYLE: dict[str, Any] = {"color": "white", "weight": "bold", "fontsize": 10}  # how numbers are written
INFO = cache(ImageNetInfo)  # reads files
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Shown:
    """A crop and its labels."""

    number: int  # from 1
    crop: Crop
    pixels: Tensor  # (3, SIZE, SIZE) uint8
    labels: list[tuple[str, float, bool]]  # class, probability, whether it is the true one; most probable first

    @property
    def colour(self) -> str:
        """The colour of its box and its bars."""
        return COLOURS[(self.number - 1) % len(COLOURS)]

    @property
    def title(self) -> str:
        """Its number and, if it is mirrored, a mark."""
        return f"{self.number} {MIRRORED}" if self.crop.flip else str(self.number)


@dataclass(frozen=True)
class Scene:
    """Everything that the picture shows."""

    path: str
    pixels: Tensor  # (3, H, W) uint8
    true: str  # class
    store: str
    crops: list[Shown]


def described(name: str) -> str:
    """A class in words: the first synonym of an ImageNet class, or the name of another class."""
    words = INFO().label_name_to_description(name).partition(",")[0] if name in wnids() else name
    return words if len(words) <= NAME else words[: NAME - 1].rstrip() + "…"


def find(asked: str | None, folder: Path, paths: Sequence[str], labels: SoftLabels) -> int:
    """The number of an image; the first that has labels when none is asked for; QatError if there is no such image."""
    if asked is None:
        return int(labels.done.argmax())
    if asked.isdecimal() and int(asked) < len(paths):
        return int(asked)
    for name in (Path(asked).as_posix(), Path(os.path.relpath(asked, folder)).as_posix()):
        if name in paths:
            return paths.index(name)
    raise QatError(f"image is {asked!r}: give a number, 0..{len(paths) - 1}, or a path such as {folder / paths[0]}")


def look(store: Path, root: Path, image: str | None, count: int | None) -> Scene:
    """Read an image and the labels of its first crops; QatError for a store that was made on other images."""
    labels, tree = SoftLabels(store), Tree(root)
    source, classes = tree.source("train"), tree.number()
    labels.check_images(source, classes.names)
    labels.check_finished(partial=True)
    count = min(CROPS, labels.header.num_crops) if count is None else count
    if not 1 <= count <= labels.header.num_crops:
        raise QatError(f"crops is {count}: choose 1..{labels.header.num_crops}, which {store} has of an image")
    index = find(image, source.place, source.names, labels)
    path, true = source.path(index), classes.names[classes.of(source)[index]]
    stored = labels.read(index, np.arange(count))
    stored.check(labels.header.num_classes)
    try:
        pixels = decode(source.open(index))
    except Exception as error:  # Pillow has no common base
        raise QatError(f"cannot read {path}: {reason(error)}; choose another image") from None
    check_size(stored.image_size, (pixels.shape[1], pixels.shape[2]), f"{path}: ")
    shows = shown(pixels, stored, labels, classes.names, true)
    return Scene(source.names[index], pixels, described(true), str(labels), shows)


def shown(pixels: Tensor, stored: ImageLabels, labels: SoftLabels, classes: Sequence[str], true: str) -> list[Shown]:
    """The stored crops of an image, replayed, with their labels as they are trained on."""
    crops = stored.crops()
    recovered = recover(labels.header, stored.classes, stored.probs)
    made = []
    for i, view in enumerate(replay(pixels, crops, SIZE, "bilinear")):
        top = zip(recovered.classes[i, :TOP].tolist(), recovered.probs[i, :TOP].tolist(), strict=True)
        named = [(described(classes[number]), prob, classes[number] == true) for number, prob in top]
        made.append(Shown(i + 1, crops[i], view, named))
    return made


def tags(crops: Sequence[Crop], widths: Sequence[float], height: float, image: tuple[int, int]) -> list[Box]:
    """Places for the numbers of the boxes: in a corner of the box, or elsewhere in it, where no other number is."""
    placed: list[Box] = []
    for crop, width in zip(crops, widths, strict=True):
        right, bottom = crop.left + crop.width - width, crop.top + crop.height - height
        lefts = [crop.left, right, *np.arange(crop.left, right, width / 2)]
        tops = [crop.top, bottom, *np.arange(crop.top, bottom, height)]
        inside = [(max(0, min(x, image[1] - width)), max(0, min(y, image[0] - height))) for y in tops for x in lefts]
        boxes = [(x, y, x + width, y + height) for x, y in inside]
        placed.append(next((a for a in boxes if not any(overlap(a, b) for b in placed)), boxes[0]))
    return placed


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_image(axes: Any, scene: Scene, inches: float) -> None:
    """Draw the image, ``inches`` wide, with the numbered boxes of its crops."""
    from matplotlib.patches import Rectangle

    _, height, width = scene.pixels.shape
    axes.imshow(scene.pixels.permute(1, 2, 0).numpy(), aspect="auto")
    axes.axis("off")
    inch = width / inches  # pixels of the image
    for shown in scene.crops:
        box = (shown.crop.left - 0.5, shown.crop.top - 0.5), shown.crop.width, shown.crop.height
        axes.add_patch(Rectangle(*box, fill=False, edgecolor="white", linewidth=3.8))
        axes.add_patch(Rectangle(*box, fill=False, edgecolor=shown.colour, linewidth=2, zorder=2))
    sizes = [(WIDE_TAG if shown.crop.flip else TAG) * inch for shown in scene.crops]
    places = tags([shown.crop for shown in scene.crops], sizes, TAG * inch, (height, width))
    for shown, (left, top, right, bottom) in zip(scene.crops, places, strict=True):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=shown.colour, zorder=3))
        axes.text((left + right) / 2, (top + bottom) / 2, shown.title, ha="center", va="center", **STYLE, zorder=4)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def draw_crop(view: Any, bars: Any, shown: Shown) -> None:
    """Draw a crop and, beside it, its classes as bars with their names; the true class is bold."""
    view.imshow(shown.pixels.permute(1, 2, 0).numpy())
    view.set(xticks=[], yticks=[])
    for spine in view.spines.values():
        spine.set(color=shown.colour, linewidth=2.5)
    frame = {"facecolor": shown.colour, "edgecolor": "none", "pad": 3}
    view.text(10, 10, shown.title, va="top", bbox=frame, **STYLE)
    bars.set(xlim=(0, 1.22), ylim=(TOP - 0.5, -0.5))
    bars.axis("off")
    for place, (name, prob, true) in enumerate(shown.labels):
        weight = "bold" if true else "normal"
        bars.barh(place, 1, height=0.8, color="#f1f1f1")
        bars.barh(place, prob, height=0.8, color=shown.colour, alpha=0.38)
        bars.text(0.02, place, name, va="center", fontsize=9, weight=weight)
        bars.text(1.22, place, f"{100 * prob:.1f} %", va="center", ha="right", fontsize=9, weight=weight)


@dataclass(frozen=True)
class Sheet:
    """A figure whose parts are placed in inches from its upper left corner."""

    figure: Any
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Add a part of this place and size."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, left: float, top: float, content: str, **style: Any) -> None:
        """Write text whose upper left corner is at this place."""
        self.figure.text(left / self.width, 1 - top / self.height, content, va="top", **style)


def compose(scene: Scene, figure: Any) -> None:
    """Lay the image, its crops and the title out on a figure."""
    height, width = scene.pixels.shape[1:]
    columns = min(COLUMNS, len(scene.crops))
    tall = max(-(-len(scene.crops) // columns) * (VIEW + GAP) - GAP, 2 * VIEW)
    inch = max(width / IMAGE, height / tall)  # pixels of the image
    right = MARGIN + max(width / inch, VIEW) + 2 * GAP  # of the image
    cell = VIEW + GAP / 2 + BARS + 2 * GAP
    sheet = Sheet(figure, right + columns * cell - 2 * GAP + MARGIN, HEAD + tall + MARGIN)
    figure.set_size_inches(sheet.width, sheet.height)
    sheet.text(MARGIN, 0.16, scene.true, fontsize=15, weight="bold")
    about = f"{scene.path}, {width} x {height} pixels\n{scene.store}; {MIRRORED} is a mirrored crop"
    sheet.text(MARGIN, 0.48, about, fontsize=9, color="#555555", linespacing=1.4)
    draw_image(sheet.axes(MARGIN, HEAD, width / inch, height / inch), scene, width / inch)
    for place, shown in enumerate(scene.crops):
        left, top = right + place % columns * cell, HEAD + place // columns * (VIEW + GAP)
        view, bars = sheet.axes(left, top, VIEW, VIEW), sheet.axes(left + VIEW + GAP / 2, top, BARS, VIEW)
        draw_crop(view, bars, shown)


def draw(scene: Scene, output: Path) -> None:
    """Write the picture; QatError if matplotlib is missing or the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QatError(f"the picture needs matplotlib ({error}): pip install 'qat[demo]'") from error
    if output.is_dir():
        raise QatError(f"output is {output}, a folder: give the name of a file")
    figure = Figure(dpi=110)
    compose(scene, figure)
    try:
        figure.savefig(output)
    except (OSError, ValueError) as error:
        raise QatError(f"cannot write {output}: {reason(error)}; give another --output, such as labels.png") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 for success and 2, with one line on stderr, for bad input."""
    parser = Parser(prog="show_softlabels", description="Draw an image and the labels of its crops.")
    parser.add_argument("labels", type=Path, help="store of soft labels")
    parser.add_argument("--data.root", dest="root", type=Path, required=True, help="folder with train/<class>/*")
    parser.add_argument("--image", help="number of an image, or its path; the first with labels when left out")
    parser.add_argument("--crops", type=int, help=f"how many of its crops (default: {CROPS})")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    return run_script(
        parser, lambda args: draw(look(args.labels, args.root, args.image, args.crops), args.output), arguments
    )


if __name__ == "__main__":
    sys.exit(main())
