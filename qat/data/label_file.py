"""Label files of validation images that lie in one folder: what the distributors of ImageNet and Tiny-ImageNet give.

| file | a line |
|---|---|
| val.txt of ILSVRC and Caffe, and lists of other projects | ``ILSVRC2012_val_00000001.JPEG 65`` |
| the same with names of classes | ``ILSVRC2012_val_00000001.JPEG n01751748`` |
| val_annotations.txt of Tiny-ImageNet | ``val_0.JPEG``, tab, ``n03444034``, tab, a box |
| LOC_val_solution.csv of Kaggle | ``ILSVRC2012_val_00048981,n03995372 85 1 499 272`` |
| ILSVRC2012_validation_ground_truth.txt of the development kit | ``490``, for the images in the order of their names |

A number beside a name is a label. A number alone is an ILSVRC2012_ID, which has an order of its own: the files
map_clsloc.txt or meta.mat of the development kit tell it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath

from qat.data.folder import are_numbers
from qat.errors import QatError
from qat.ranges import shown

USUAL = (
    "val_annotations.txt",
    "val.txt",
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
)
KAGGLE = "ImageId"  # first word of a table whose second column goes on with boxes
Line = tuple[int, list[str]]  # number of a line, from 1, and its columns


def find_label_file(split: Path) -> Path | None:
    """The label file of root/val or root/val.tar by its usual names: in the folder, beside it, or in root/meta."""
    kit = split.parent / "ILSVRC2012_devkit_t12" / "data"
    places = [split / name for name in USUAL]
    places += [folder / name for folder in (split.parent, split.parent / "meta", kit) for name in USUAL]
    return next((place for place in places if place.is_file()), None)


def read_label_file(file: Path, names: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The class of every image, by a label file.

    Args:
        file: the label file.
        names: sorted paths of the images, relative to their folder.

    Returns:
        The class of every image, and whether these are labels rather than names of classes.

    Raises:
        QatError: the file cannot be read, contradicts itself, or lacks an image.
    """
    lines = list(_lines(file))
    if lines and all(len(columns) == 1 for _, columns in lines):
        return _by_order(file, lines, names), False
    if lines and file.suffix.lower() == ".csv" and _stem(lines[0][1][0]) not in {_stem(name) for name in names}:
        first, *lines = lines
        is_kaggle = first[1][0] == KAGGLE
    else:
        is_kaggle = False
    table = _table(file, lines, is_kaggle)
    classes = [
        table.get(name) or table.get(PurePosixPath(name).name) or table.get(_stem(name)) or None for name in names
    ]
    if None in classes:
        missing = names[classes.index(None)]
        raise QatError(f"{file} has no label for {missing}, and for {classes.count(None) - 1} more of {len(names)}")
    found = tuple(str(name) for name in classes)
    return found, are_numbers(set(found))


def read_text(file: Path, option: str) -> list[str]:
    """The lines of a text file, which end as on Linux, Windows or the old Mac; QatError when it cannot be read.

    Args:
        file: the file.
        option: what the error calls the option that names it.
    """
    try:  # no splitlines(), which cuts at a form feed and at separators of Unicode too
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise QatError(f"{option}: cannot read {file}: {error.strerror}") from None


def read_csv(file: Path, option: str) -> Iterator[Line]:
    """The rows of a CSV file that are not empty, with the number of the line where each begins.

    Args:
        file: the file.
        option: what the errors call the option that names it.

    Raises:
        QatError: the file cannot be read, a quotation mark is not closed, or a cell is longer than Python reads.
    """
    text = [*read_text(file, option), ""]  # an empty row ends the table, unless it lies in quotation marks
    rows, row, number = csv.reader(f"{line}\n" for line in text), [], 1
    try:
        for row in rows:
            if rows.line_num == len(text):
                break
            if len(row) > 1 or "".join(row).strip():
                yield number, [cell.strip() for cell in row]
            number = rows.line_num + 1
    except csv.Error as error:
        raise QatError(f"{option}: {file}, line {number}: {error}") from None
    if row:
        raise QatError(f"{option}: {file}, line {number}: a quotation mark is not closed")


def _lines(file: Path) -> Iterator[Line]:
    """The lines that are not empty, in columns: of CSV, separated by tabs, or a name and the rest behind a space."""
    if file.suffix.lower() == ".csv":
        yield from read_csv(file, "data.val_labels")
        return
    for number, line in enumerate(read_text(file, "data.val_labels"), 1):
        if line.strip():
            yield number, line.strip().split("\t") if "\t" in line.strip() else line.rsplit(None, 1)


def _table(file: Path, lines: Sequence[Line], is_kaggle: bool) -> dict[str, str]:
    """The class by the name in the file; by the last part of it, and by that without its suffix, where one is meant."""
    table: dict[str, str] = {}
    shorter: dict[str, str] = {}  # "" where several images with other classes have the same short name
    for number, columns in lines:
        label = columns[1].partition(" ")[0] if is_kaggle and len(columns) > 1 else "".join(columns[1:2]).strip()
        if not label:
            raise QatError(
                f"{file}, line {number}: expected the name of an image and its class, found {shown(columns[0])}"
            )
        name = columns[0].strip().removeprefix("./")
        if table.setdefault(name, label) != label:
            other = f"{shown(label)} here and {shown(table[name])} above"
            raise QatError(f"{file}, line {number}: {shown(name)} has the class {other}")
        for key in (PurePosixPath(name).name, _stem(name)):
            shorter[key] = label if shorter.setdefault(key, label) == label else ""
    return shorter | table


def _by_order(file: Path, lines: Sequence[Line], names: Sequence[str]) -> tuple[str, ...]:
    """The classes of the images in the order of their names, from one ILSVRC2012_ID per line."""
    if len(lines) != len(names):
        raise QatError(f"{file} has {len(lines)} lines for {len(names)} images: one line is needed for each image")
    wnids = _wnids_by_id(file)
    for number, (word,) in lines:
        if word not in wnids:
            raise QatError(f"{file}, line {number}: {shown(word)} is no ILSVRC2012_ID; give one of 1..{len(wnids)}")
    return tuple(wnids[word] for _, (word,) in lines)


def _wnids_by_id(file: Path) -> Mapping[str, str]:
    """The wnid of every ILSVRC2012_ID, from the files of the development kit beside a ground truth."""
    text, meta = file.with_name("map_clsloc.txt"), file.with_name("meta.mat")
    if text.is_file():  # "n02119789 1 kit_fox"
        rows = [line.split() for line in read_text(text, "data.val_labels")]
        return {row[1]: row[0] for row in rows if len(row) > 1}
    if not meta.is_file():
        raise QatError(
            f"{file} has one ILSVRC2012_ID per line, and their order is not that of the labels: put map_clsloc.txt or "
            "meta.mat of the development kit beside it, or give a file with lines such as "
            "'ILSVRC2012_val_00000001.JPEG 65'"
        )
    try:
        synsets = import_module("scipy.io").loadmat(meta, squeeze_me=True)["synsets"]
        numbers, wnids = synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()
    except ImportError:
        raise QatError(f"{meta} can only be read with SciPy: pip install scipy, or give another label file") from None
    except Exception as error:  # SciPy's reader raises what it likes
        raise QatError(f"cannot read {meta}: {error}") from None
    return {str(int(number)): str(wnid) for number, wnid in zip(numbers, wnids, strict=True) if int(number) <= 1000}


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
