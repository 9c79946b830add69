"""`qat export`: read a checkpoint, write it in another form, check what was written, and only then say so.

A file gets its name once it has been checked. Until then, and for good where the check fails, it is named NAME.failed.
"""

from __future__ import annotations

import json
import logging
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
REPORT = ".export.json"
WEIGHTS = "model.safetensors"  # in a folder


def export(options: ExportOptions) -> None:
    """Export a checkpoint, and log what was written.

    Raises:
        QatError: for a checkpoint that cannot be read or is already packed, an output that cannot be written, or a
            file that is not what the checkpoint is; such a file is kept under another name.
    """
    source = find_checkpoint(options.ckpt.expanduser(), options.runs.expanduser(), None)
    _check_output(options, source)
    results = read_results(options.results)
    card, content = checkpoint.read(source, trust=options.trust)
    if not card.rules:
        raise QatError(f"{source} is a float model, which has no codes: give the checkpoint of a quantized one")
    images = comparison_images(options.images, Preprocessing(**card.preprocessing))
    model = checkpoint.load(source, options.trust)
    file = options.output / WEIGHTS if options.format == "folder" else options.output
    size, found = _write_checked(file, model, card, content, images, options)
    costs = cost(model, card.preprocessing["size"])
    sizes = {"size_mb": size / 1e6, "described_mb": costs.size_mb, "float_size_mb": costs.float_size_mb}
    report = {"format": "safetensors", "rest": options.rest, **sizes, **found}
    with replacing(file.with_name(file.stem + REPORT)) as opened:
        opened.write(json.dumps(report, indent=2) + "\n")
    if options.format == "folder":
        write_config(options.output / "config.json", model, card)
        write_model_card(options.output / "README.md", model, card, content, report, results)
    log.info("%s: %s, %.3f MB (float32: %.2f MB); %s", file, card.arch, report["size_mb"], report["float_size_mb"],
             summary(model))  # fmt: skip
    log.info("%s", _summary(report, options.images))
    log.info("next: qat validate --ckpt %s --data.root DIR", file)


def _check_output(options: ExportOptions, source: Path) -> None:
    """Raise QatError for an output that cannot, or must not, be written."""
    output, whole = options.output, options.format == "folder"
    if is_packed(source):
        raise QatError(f"{source} is packed already: copy it, or export the checkpoint that it was made from")
    if not whole and output.suffix != SUFFIX:
        raise QatError(f"--output is {output}: give a name that ends in {SUFFIX}, or --format folder")
    if not output.parent.is_dir():
        raise QatError(f"--output is {output}: there is no folder {output.parent}, create it first")
    if output.exists() and (output.is_dir() != whole or not options.force):
        what = f"a {'folder' if output.is_dir() else 'file'}"
        raise QatError(f"--output is {output}, {what} that exists: give another name, or --force true to overwrite")


def _write_checked(
    file: Path, model: nn.Module, card: checkpoint.Card, content: dict[str, Any], images: Tensor, options: ExportOptions
) -> tuple[int, dict[str, Any]]:
    """Write a packed file, read it again and compare it; returns its size in bytes and what was found."""
    unchecked = file.with_name(f"{file.stem}{FAILED}{SUFFIX}")
    size = write_packed(unchecked, model, card, content, options.rest)
    found = compare(model, checkpoint.load(unchecked, options.trust), card, options.rest, images)
    if different := found["different_tensors"]:
        raise QatError(
            f"what was read again differs in {len(different)} tensors, the first is {different[0]!r}: the file is kept "
            f"as {unchecked}, do not use it"
        )
    with writing(file):
        unchecked.replace(file)
    return size, found


def _summary(report: dict[str, Any], images: Path | None) -> str:
    """What the check has found, in a line."""
    read = f"read again: {report['tensors']} tensors as they should be"
    count, difference = report["images"], report["largest_logit_difference"]
    if difference == 0:
        return f"{read}, logits of {count} {'random ' if images is None else ''}images equal to the bit"
    if images is None:
        return f"{read}, rounded to float16, which changes logits: --images FOLDER compares classes on real images"
    return f"{read}, rounded to float16; {report['same_class']:.1%} of {count} images keep their class"
