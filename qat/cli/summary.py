"""The last lines of a command: what came out, where it is, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

PHOTOS = "FOLDER"  # stands for images that the user has
WORST = 5  # sites that are printed after a validation


def show(*lines: str) -> None:
    """Print lines as they are, however narrow the terminal is: paths must be possible to copy."""
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def command(verb: str, **options: object) -> str:
    """A line that names the next command; options that are None are left out, and ``data_root`` means data.root."""
    words = [f"--{name.replace('data_', 'data.').replace('model_', 'model.')} {shlex.quote(str(value))}"
             for name, value in options.items() if value is not None]  # fmt: skip
    return f"next: qat {verb} {' '.join(words)}"


def after_training(
    step: int, metrics: Mapping[str, Any], last: Path, best: tuple[Path, float] | None, root: Path | None
) -> Iterator[str]:
    """What a finished training says.

    Args:
        step: optimizer steps of the whole run.
        metrics: of the last validation, val/top1 among them where there was one.
        last: the last checkpoint.
        best: the best checkpoint on the validation images and its top-1, where there is one.
        root: folder of the images.
    """
    found = ""
    if "val/top1" in metrics:
        found = "; top-1 {:.2f} %, top-5 {:.2f} %".format(*(float(metrics[f"val/{name}"]) for name in ("top1", "top5")))
    yield f"trained to step {step}{found}"
    yield f"checkpoint: {last}"
    if best is not None:
        yield f"best on the validation images, top-1 {best[1]:.2f} %: {best[0]}"
    yield command("validate", ckpt=last, data_root=root)


def after_validation(results: Mapping[str, Any], ckpt: Path | None, calibrated: Path | None) -> Iterator[str]:
    """What a validation has found, a line for each thing.

    Args:
        results: what the results file holds.
        ckpt: the checkpoint that was evaluated, if it was one.
        calibrated: the checkpoint of a calibration that came before, if there was one.
    """
    line = "top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {images} images in {seconds:.1f} s"
    yield line.format(**results)
    if results["recipe"] != "float":
        line = "{recipe}; {size_mb:.2f} MB with weights packed at their width (float32: {float_size_mb:.2f} MB)"
        yield line.format(**results)
    errors = results["calibration"].get("snr_db", {})
    if worst := sorted(errors, key=errors.__getitem__)[:WORST]:
        yield "most error (signal to noise): " + ", ".join(f"{site} {errors[site]:.1f} dB" for site in worst)
    if calibrated is not None:
        yield f"checkpoint: {calibrated}"
    if (file := calibrated or ckpt) is not None:
        yield command("predict", ckpt=file, data_images=PHOTOS, output="predictions.csv")
