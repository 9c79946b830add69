"""Every model family on handwritten digits: a small float model of each, quantized at W3A3 and W2A2.

    python benchmarks/families.py --out families_out        -> 20 minutes on 2 cores; finished runs are kept

Float models train as configs/demo/float.yaml says and quantized ones as configs/demo/qat.yaml, with the float model as
their teacher; only architecture and image size differ. One seed; 360 validation images, so one image is 0.28 points.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (3, 2)


class Member(NamedTuple):
    """A small model of a family."""

    arch: str
    size: int  # side of the images, pixels
    model_args: dict[str, Any]


MEMBERS = {
    "ViT": Member("vit_tiny_patch16_224", 16, {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}),
    "Swin": Member(
        "swin_tiny_patch4_window7_224", 16,
        {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    "SReT": Member(
        "sret_tiny", 32,
        {"embed_dims": [24, 48], "depths": [1, 1], "num_heads": [2, 4], "groups": [[4, 2], [2, 1]]},
    ),
}  # fmt: skip


def options(out: Path, family: str) -> list[str]:
    """The options that all commands for a family share."""
    arch, size, model_args = MEMBERS[family]
    found = {
        "data.root": out / "data",
        "model.arch": arch,
        "model.model_args": json.dumps({"img_size": size, **model_args}),
        "data.preprocessing": json.dumps({"size": size, "resize": size}),
    }
    return [word for name, value in found.items() for word in (f"--{name}", str(value))]


def last(out: Path, name: str) -> Path | None:
    """The newest last.ckpt of a run; None where there is none."""
    return next(iter(sorted((out / "runs" / name).glob("*/last.ckpt"), reverse=True)), None)


def run(words: list[str]) -> float:
    """Top-1 of the validation that ends a command."""
    from qat.cli.main import run as command

    return float(command(words).trainer.callback_metrics["val/top1"])


def fit(out: Path, name: str, config: str, more: list[str]) -> float:
    """Top-1 of a training run, which is not repeated where its result exists."""
    result = out / f"{name}.json"
    if not result.is_file():
        words = ["fit", "--config", str(ROOT / f"configs/demo/{config}.yaml"), *more]
        result.write_text(json.dumps(run([*words, "--runs", str(out / "runs"), "--name", name])))
    found: float = json.loads(result.read_text())
    return found


def measure(out: Path, family: str) -> dict[str, float]:
    """Top-1 of the float model of a family, and calibrated and trained at each width."""
    common = options(out, family)
    found = {"float": fit(out, f"{family}_float", "float", common)}
    weights = str(last(out, f"{family}_float"))
    for bits in WIDTHS:
        quantized = [*common, "--model.checkpoint", weights, "--model.w_bits", str(bits), "--model.a_bits", str(bits)]
        found[f"W{bits}A{bits} calibrated"] = run(
            [
                "validate",
                "--config",
                str(ROOT / "configs/demo/qat.yaml"),
                *quantized,
                "--model.teacher",
                "null",
                "--runs",
                str(out / "calibrated"),
            ]
        )
        teacher = ["--model.teacher", MEMBERS[family].arch, "--model.teacher_checkpoint", weights]
        found[f"W{bits}A{bits} trained"] = fit(out, f"{family}_w{bits}a{bits}", "qat", [*quantized, *teacher])
    return found


def main() -> None:
    """Do the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description="Every model family on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("families_out"), help="folder for everything (families_out)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (2)")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        pool.submit(digits, given.out / "data").result()
        found = dict(zip(MEMBERS, pool.map(measure, [given.out] * len(MEMBERS), MEMBERS), strict=True))
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("top-1 %", *next(iter(found.values()))):
        table.add_column(name, justify="left" if name == "top-1 %" else "right", no_wrap=True)
    for family, values in found.items():
        table.add_row(family, *(f"{value:.2f}" for value in values.values()))
    Console(width=120).print(table)


def digits(folder: Path) -> None:
    """Write the images."""
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    from digits import write

    write(folder)


if __name__ == "__main__":
    main()
