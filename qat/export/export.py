"""`qat export`: read a checkpoint, write it in another form, check what was written, and only then say so.

A file gets its name once it has been checked. Until then, and for good where the check fails, it is named NAME.failed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat import checkpoint
from qat.checkpoint.packed import SUFFIX, is_packed, write_packed
from qat.errors import QatError
from qat.export.check import compare, comparison_images
from qat.export.hub import read_results, write_config, write_model_card
from qat.export.options import ExportOptions
from qat.preprocessing import Preprocessing
from qat.runs.folder import find_checkpoint
from qat.runs.writing import replacing, writing
from qat.sites.describe import cost, summary

log = logging.getLogger(__name__)
FAILED = ".failed"
REPORT = ".export.json"  # follows the name of the file
EXACT = 1e-9  # the largest difference of logits in float64, as a share of the largest logit
WEIGHTS = "model.safetensors"  # in a folder
SUFFIXES = {"safetensors": SUFFIX, "folder": SUFFIX, "onnx": ".onnx"}
EXACT_IMAGES = 2  # for the comparison in float64, which takes seconds for each

Found = dict[str, Any]  # a report, as plain data
Write = Callable[[Path], tuple[Found, str]]  # writes a file, and returns what its check has found, and that in a line


def export(options: ExportOptions) -> None:
    """Export a checkpoint, and log what was written.

    Raises:
        QatError: for a checkpoint that cannot be read or is already packed, an output that cannot be written, a site
            that the format cannot express, or a file that is not what the checkpoint is; such a file is kept under
            another name.
    """
    source = find_checkpoint(options.ckpt.expanduser(), options.runs.expanduser(), None)
    file = _check_output(options, source)
    results = read_results(options.results)
    card, content = checkpoint.read(source, trust=options.trust)
    if not card.rules:
        raise QatError(f"{source} is a float model, which has no codes: give the checkpoint of a quantized one")
    images = comparison_images(options.images, Preprocessing(**card.preprocessing))
    model = checkpoint.load(source, options.trust)
    write = _onnx(model, card, images, options) if options.format == "onnx" else _packed(
        model, card, content, images, options
    )  # fmt: skip
    found, told = _checked(file, write)
    costs = cost(model, card.preprocessing["size"])
    sizes = {"size_mb": file.stat().st_size / 1e6, "described_mb": costs.size_mb, "float_size_mb": costs.float_size_mb}
    report = {"format": options.format, **sizes, "images": len(images), **found}
    with replacing(file.with_name(file.name + REPORT)) as opened:
        opened.write(json.dumps(report, indent=2) + "\n")
    if options.format == "folder":
        write_config(options.output / "config.json", model, card)
        write_model_card(options.output / "README.md", model, card, content, report, results, options.base_model)
    log.info("%s: %s, %.3f MB (float32: %.2f MB); %s", file, card.arch, report["size_mb"], report["float_size_mb"],
             summary(model))  # fmt: skip
    log.info("%s", told)
    if options.format != "onnx":
        log.info("next: qat validate --ckpt %s --data.root DIR", file)


def _check_output(options: ExportOptions, source: Path) -> Path:
    """The file of the weights; QatError for an output that cannot, or must not, be written."""
    output, whole, suffix = options.output, options.format == "folder", SUFFIXES[options.format]
    if is_packed(source) and options.format != "onnx":
        raise QatError(f"{source} is packed already: copy it, or export the checkpoint that it was made from")
    if not whole and output.suffix != suffix:
        raise QatError(f"--output is {output}: give a name that ends in {suffix}, or another --format")
    if not output.parent.is_dir():
        raise QatError(f"--output is {output}: there is no folder {output.parent}, create it first")
    if output.exists() and output.is_dir() != whole:
        raise QatError(
            f"--output is {output}, which is {'a folder' if output.is_dir() else 'a file'}: give another name"
        )
    file = Path(os.path.realpath(output / WEIGHTS if whole else output))  # what a link leads to is replaced
    for path in (output, file.with_name(file.name + REPORT), _unchecked(file)):
        if path.exists() and not options.force:
            raise QatError(f"--output is {output}, and {path} exists: give another name, or --force true to overwrite")
    return file


def _unchecked(file: Path) -> Path:
    """The name of a file that is not checked yet."""
    return file.with_name(f"{file.stem}{FAILED}{file.suffix}")


def _checked(file: Path, write: Write) -> tuple[Found, str]:
    """Write a file under another name, and give it its own once its check has passed."""
    unchecked = _unchecked(file)
    found = write(unchecked)
    with writing(file):
        unchecked.replace(file)
    return found


def _packed(
    model: nn.Module, card: checkpoint.Card, content: dict[str, Any], images: Tensor, options: ExportOptions
) -> Write:
    """Writes a packed file, and reads it again."""

    def write(file: Path) -> tuple[Found, str]:
        write_packed(file, model, card, content, options.rest)
        found = compare(model, checkpoint.load(file, options.trust), card, options.rest, images)
        if different := found["different_tensors"]:
            raise QatError(
                f"what was read again differs in {len(different)} tensors, the first is {different[0]!r}: the file is "
                f"kept as {file}, do not use it"
            )
        told = f"read again: {found['tensors']} tensors as they should be"
        if options.rest == "float32" and found["largest_logit_difference"] != 0:  # NaN is another one, too
            raise QatError(
                f"logits differ by {found['largest_logit_difference']:.2g} from those of the checkpoint: the file is "
                f"kept as {file}, do not use it"
            )
        if found["largest_logit_difference"] == 0:
            told += f", logits of {_count(images, options)} equal to the bit"
        elif options.images is None:
            told += ", rounded to float16, which changes logits: --images FOLDER compares classes on real images"
        else:
            told += f", rounded to float16; {found['same_class']:.1%} of {len(images)} images keep their class"
        return {"rest": options.rest, **found}, told

    return write


def _onnx(model: nn.Module, card: checkpoint.Card, images: Tensor, options: ExportOptions) -> Write:
    """Writes an ONNX file, and runs it."""
    from qat.export.graph.build import build, need_packages

    need_packages()
    from qat.export.graph.check import in_runtime, same_function

    preprocessing = Preprocessing(**card.preprocessing)
    normalized = preprocessing.normalize(images)

    def write(file: Path) -> tuple[Found, str]:
        built = build(model, card, options.pixels, options.activations, options.opset)
        with replacing(file, "wb") as opened:
            opened.write(built.proto.SerializeToString())
        few = images[:EXACT_IMAGES] if options.pixels else normalized[:EXACT_IMAGES]
        different, count, distance = same_function(built, model, few, preprocessing)
        if different or not distance <= EXACT:
            raise QatError(
                f"in float64, {different} of {count} codes and logits by {distance:.2g} differ from those of the "
                f"checkpoint: the file is kept as {file}, do not use it"
            )
        found = in_runtime(file, model, images if options.pixels else normalized, normalized)
        told = f"in float64, all {count} codes of {len(few)} images are those of the checkpoint"
        told += (
            f"; in onnxruntime, {found['same_class']:.1%} of {_count(images, options)} have the same class (torch with "
            f"itself in float64: {found['same_class_torch_float64']:.1%})"
        )
        return {"float64_codes": count, "float64_logit_difference": distance, **found}, told

    return write


def _count(images: Tensor, options: ExportOptions) -> str:
    return f"{len(images)} {'random ' if options.images is None else ''}images"
