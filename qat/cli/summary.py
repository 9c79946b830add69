"""The last lines of a command: what came out, where it is, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

PHOTOS = "FOLDER"  # stands for images that the user has
IMAGES = "DIR"  # stands for a folder with train/ and val/
WORST = 5  # sites that are printed after a validation
WORST_CALIBRATED = 3  # and after a calibration, which has more to say
SHORT = {"trainer_max_steps": 800, "model_lr": 2e-5, "model_step_lr": 1e-5}  # a training after a good calibration
EVALUATED = "top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {images} images in {seconds:.1f} s"
SIZE = "{recipe}; {size_mb:.2f} MB with weights packed at their width (float32: {float_size_mb:.2f} MB)"


def show(*lines: str) -> None:
    """Print lines as they are, however narrow the terminal is: paths must be possible to copy."""
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def command(verb: str, *before: str, **options: object) -> str:
    """A line that names the next command.

    Args:
        verb: of the command.
        before: words that come before the options.
        options: those that are None are left out, and ``data_root`` means data.root; model and trainer likewise.
    """
    words = [shlex.quote(word) for word in before]
    for name, value in options.items():
        part, _, rest = name.partition("_")
        name = f"{part}.{rest}" if part in ("data", "model", "trainer") else name
        words += [f"--{name} {shlex.quote(str(value))}"] if value is not None else []
    return f"next: qat {verb} {' '.join(words)}"


class Best(NamedTuple):
    """The best checkpoint of a run: its file, the metric that it was chosen by, and the value."""

    file: Path
    metric: str
    value: float

    def __str__(self) -> str:
        where = "the validation images, top-1 {:.2f} %" if self.metric == "val/top1" else f"{self.metric} {{:.4f}}"
        return f"best on {where.format(self.value)}: {self.file}"


def after_training(
    step: int, metrics: Mapping[str, Any], last: Path, best: Best | None, root: Path | None
) -> Iterator[str]:
    """What a finished training says.

    Args:
        step: optimizer steps of the whole run.
        metrics: of the last validation, val/top1 among them where there was one.
        last: the last checkpoint.
        best: the best checkpoint, where there is one.
        root: folder of the images.
    """
    found = ""
    if "val/top1" in metrics:
        found = "; top-1 {:.2f} %, top-5 {:.2f} %".format(*(float(metrics[f"val/{name}"]) for name in ("top1", "top5")))
    yield f"trained to step {step}{found}"
    yield f"checkpoint: {last}"
    if best is not None:
        yield str(best)
    yield command("validate", ckpt=last, data_root=root)


def after_validation(results: Mapping[str, Any], ckpt: Path | None, calibrated: Path | None) -> Iterator[str]:
    """What a validation has found, a line for each thing.

    Args:
        results: what the results file holds.
        ckpt: the checkpoint that was evaluated, if it was one.
        calibrated: the checkpoint of a calibration that came before, if there was one.
    """
    yield EVALUATED.format(**results)
    if results["recipe"] != "float":
        yield SIZE.format(**results)
    yield from _worst_sites(results["calibration"], WORST)
    if calibrated is not None:
        yield f"checkpoint: {calibrated}"
    if (file := calibrated or ckpt) is not None:
        yield command("predict", ckpt=file, data_images=PHOTOS, output="predictions.csv")


def after_calibration(
    results: Mapping[str, Any], ckpt: Path, root: Path | None, has_val: bool, model: Sequence[str],
    plans_training: bool,
) -> Iterator[str]:  # fmt: skip
    """What a calibration has found, a line for each thing.

    Args:
        results: what the results file holds.
        ckpt: the checkpoint of the calibration.
        root: folder of training images, where it is known.
        has_val: it has validation images too.
        model: the words of the command that describe the model.
        plans_training: they say how it is trained, too; else a short training is named.
    """
    calibration = results["calibration"]
    how = "calibrated by {} on {images} images in {seconds:.1f} s, peak memory {peak_memory_mb} MB"
    yield how.format(calibration["method"].partition("(")[0], **calibration)
    yield SIZE.format(**results)
    for spec, sites in _by_spec(calibration.get("chosen", {})).items():
        yield f"chosen: {spec} at {', '.join(sites)}"
    yield from _worst_sites(calibration, WORST_CALIBRATED)
    if "top1" in results:
        yield EVALUATED.format(**results)
    yield f"checkpoint: {ckpt}"
    if "top1" in results:
        yield command("predict", ckpt=ckpt, data_images=PHOTOS, output="predictions.csv")
    else:
        yield command("validate", ckpt=ckpt, data_root=root if has_val else IMAGES)
    options = {"model_quant_checkpoint": ckpt, "data_root": root if root and has_val else IMAGES}
    if "held_out" in calibration:
        options["data_held_out"] = calibration["held_out"]
    yield command("fit", *model, **options, **({} if plans_training else SHORT))
    yield command("export", ckpt=ckpt, format="onnx", output=ckpt.with_suffix(".onnx"))


def _worst_sites(calibration: Mapping[str, Any], count: int) -> Iterator[str]:
    errors = calibration.get("snr_db", {})
    if worst := sorted(errors, key=errors.__getitem__)[:count]:
        yield "most error (signal to noise): " + ", ".join(f"{site} {errors[site]:.1f} dB" for site in worst)


def _by_spec(chosen: Mapping[str, Mapping[str, Any] | None]) -> dict[str, list[str]]:
    """The sites that have got the same quantizer, by what it is called."""
    found: dict[str, list[str]] = {}
    for site, spec in chosen.items():
        name = "floating point"
        if spec is not None:
            options = ", ".join(f"{option}={value}" for option, value in spec["init_args"].items())
            name = f"{spec['class_path']}({options})"
        found.setdefault(name, []).append(site)
    return found
