"""The demo: a small vision transformer for handwritten digits, quantized to 4 and to 2 bits, before and after training.

    python tools/demo.py                    -> demo_out/, 2 to 3 minutes
    python tools/demo.py --out DIR --quick     one epoch per training: runs everything, learns little

Every command is printed as you would type it, then run in this process, because loading PyTorch takes seconds.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import digits
from rich import box
from rich.console import Console
from rich.table import Table

from qat.cli.scripts import Parser, run_script

CONFIGS = Path(os.path.relpath(Path(__file__).parents[1] / "configs" / "demo"))
BITS = (4, 2)
QUICK = ("--data.crop_epochs", "1", "--trainer.check_val_every_n_epoch", "1")
console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Row:
    """One line of the final table; top-1 in percent, sizes in MB of 10**6 bytes."""

    model: str
    top1: float
    packed: float
    file: float | None


@dataclass(frozen=True)
class Demo:
    """The steps of the demo; they write everything to ``out``."""

    out: Path
    quick: bool

    def fit(self, name: str, *options: object) -> Path:
        """Train, and return the last checkpoint of the run."""
        runs = self.out / "runs"
        where = ("--data.root", self.out / "data", "--runs", runs, "--name", name)
        qat("fit", *options, *where, *(QUICK if self.quick else ()))
        return max((runs / name).glob("*/last.ckpt"))  # folders are named by date

    def top1(self, name: str, *options: object) -> float:
        """Top-1 on the 360 validation images, in percent."""
        results = self.out / f"{name}.json"
        where = ("--data.root", self.out / "data", "--runs", self.out / "runs", "--name", name)
        qat("validate", *options, *where, "--results_file", results)
        return float(json.loads(results.read_text())["top1"])

    def float_model(self) -> tuple[Path, Row]:
        """Train the float model from random weights."""
        title("A float model")
        ckpt = self.fit("float", "--config", CONFIGS / "float.yaml")
        return ckpt, trained("float", self.top1("float", "--ckpt", ckpt), ckpt)

    def quantized(self, bits: int, weights: Path) -> tuple[Row, Row]:
        """Quantize the float model by calibration alone, then by training with the float model as the teacher."""
        name = f"w{bits}a{bits}"
        model = ("--config", CONFIGS / "qat.yaml", "--model.checkpoint", weights)
        model += ("--model.w_bits", bits, "--model.a_bits", bits)
        title(f"{name.upper()}, calibrated only")
        before = self.top1(f"{name}_calibrated", *model)
        title(f"{name.upper()}, trained")
        ckpt = self.fit(name, *model, "--model.teacher_checkpoint", weights)
        title(f"{name.upper()}, evaluated from its checkpoint alone")
        after = trained(f"{name.upper()} trained", self.top1(name, "--ckpt", ckpt), ckpt)
        return Row(f"{name.upper()} calibrated", before, after.packed, None), after


def qat(*options: object) -> None:
    """Print a command, then run it; SystemExit when it fails."""
    from qat.cli.main import main

    words = [str(option) for option in options]
    show("qat", *words)
    if code := main(words):
        sys.exit(code)


def show(*words: str) -> None:
    """Print a command as a user would type it."""
    console.print(f"$ {shlex.join(words)}", style="bold cyan")


def title(text: str) -> None:
    """Print a heading between commands."""
    console.print(f"\n== {text}", style="bold")


def trained(model: str, top1: float, ckpt: Path) -> Row:
    """The row of a trained model, with the sizes of its packed weights and of its checkpoint."""
    from qat import checkpoint
    from qat.sites.describe import cost

    card, _ = checkpoint.read(ckpt)
    packed = cost(checkpoint.load(ckpt), card.preprocessing["size"]).size_mb
    return Row(model, top1, packed, ckpt.stat().st_size / 1e6)


def table(rows: list[Row]) -> Table:
    """The final table, for a terminal of 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, caption="packed: weights at their width; last.ckpt: float32, with optimizer")
    made.add_column("model", no_wrap=True)
    for column in ("top-1 %", "packed MB", "last.ckpt MB"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(row.model, f"{row.top1:.2f}", f"{row.packed:.3f}", "" if row.file is None else f"{row.file:.3f}")
    return made


def run(demo: Demo) -> int:
    """Run all steps; returns 0 if training has improved the model with the fewest bits, else 1."""
    started = time.perf_counter()
    data = demo.out / "data"
    show("python", os.path.relpath(digits.__file__), str(data))
    digits.write(data)
    # More threads are no faster on so small a model, far slower on a busy machine, and round differently.
    show("export", "OMP_NUM_THREADS=1")
    os.environ["OMP_NUM_THREADS"] = "1"
    console.print("loading PyTorch, timm and Lightning ...")
    weights, row = demo.float_model()
    rows = [row]
    for bits in BITS:
        rows += demo.quantized(bits, weights)
    title("Result")
    console.print(table(rows))
    before, after = rows[-2:]
    gained = after.top1 > before.top1
    verdict = "as it should" if gained else "NOT expected" if not demo.quick else "no wonder after one epoch"
    console.print(f"Training takes W{BITS[-1]}A{BITS[-1]} from {before.top1:.2f} % to {after.top1:.2f} %: {verdict}.")
    console.print(f"Runs, results and data are in {demo.out}; the demo took {time.perf_counter() - started:.0f} s.")
    return 0 if gained or demo.quick else 1


def main() -> int:
    """Read the command line and run the demo; 2 with one line on stderr for bad input."""
    parser = Parser(prog="demo", description="Quantize a small vision transformer on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for everything (demo_out)")
    parser.add_argument("--quick", action="store_true", help="one epoch per training, only to see that everything runs")
    return run_script(parser, lambda args: run(Demo(args.out, args.quick)))


if __name__ == "__main__":
    sys.exit(main())
