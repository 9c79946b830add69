"""Write handwritten digits as class folders: 1,797 grey images of 8 x 8 pixels from scikit-learn, without a download.

    python tools/digits.py FOLDER    ->  FOLDER/{train,val}/<digit>/<index>.png, 1,437 and 360 images

Shapes: N images, S = 8 pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from qat.cli.scripts import Parser, run_script
from qat.errors import QatError

COUNT = 1797
VAL = 360
WHITE = 16  # the largest grey value of the data set
SEED = 0
MARKER = ".complete"  # holds the number of images


def write(folder: Path) -> None:
    """Write the tree, unless a complete one is there; an interrupted write leaves nothing behind.

    Raises:
        QatError: the folder holds something else, or scikit-learn is missing.
    """
    if is_complete(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QatError(f"{folder} exists and is not a finished digits folder: remove it or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        tree = Path(scratch) / "tree"
        write_images(tree)
        (tree / MARKER).write_text(f"{COUNT}\n")
        try:
            tree.replace(folder)
        except OSError:
            if not is_complete(folder):  # otherwise another process has written the same tree in the meantime
                raise


def is_complete(folder: Path) -> bool:
    """Whether the marker file exists and has the right count."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_text().strip() == str(COUNT)


def write_images(tree: Path) -> None:
    """Write every image to ``tree/{train,val}/<digit>/``; every digit is split in the same proportion."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise QatError(f"the digits need scikit-learn ({error}): pip install 'qat[demo]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / WHITE)).astype(np.uint8)  # (N, S, S)
    train, val = train_test_split(np.arange(COUNT), test_size=VAL, stratify=digits.target, random_state=SEED)
    for split, indices in {"train": train, "val": val}.items():
        for index in indices:
            path = tree / split / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(path)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and write the images; 0, or 2 with one line on stderr for bad input."""
    parser = Parser(prog="digits", description="Write scikit-learn's handwritten digits as a class-folder tree.")
    parser.add_argument("folder", type=Path, help="where train/ and val/ go")
    return run_script(parser, lambda args: write(args.folder), arguments)


if __name__ == "__main__":
    sys.exit(main())
