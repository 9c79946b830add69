"""Turn an official DeiT, Swin, SReT or VVTQ checkpoint into a file that qat reads.

qat convert-official deit_tiny_patch16_224-a1311bcf.pth checkpoints/deit_t.safetensors
qat convert-official model_best.pth.tar vvtq_deit_t_w4a4.ckpt

Float weights, official or with the split projections of VVTQ, become a .safetensors file for --model.checkpoint. A
quantized model of VVTQ becomes a .ckpt file that describes itself, for qat validate --ckpt and qat.load; it has no
state of an optimizer, so no run can resume from it. What does not fit exactly is refused, and nothing is written.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from qat.checkpoint import KEY, PREFIX
from qat.data.folder import wnids
from qat.errors import QatError, first_line
from qat.official.conversion import Converted, convert
from qat.official.steps import ReductionBits

log = logging.getLogger(__name__)
CONTAINERS = ("model", "state_dict")  # of float weights, and of VVTQ
MODULE = "module."  # put there by (Distributed)DataParallel
LIGHTNING = {"pytorch-lightning_version": "2.5.0"}  # asked of every file that is validated; the oldest that qat allows


@dataclass(frozen=True)
class Options:
    """What to convert.

    Args:
        input: official .pth or .pth.tar file.
        output: .safetensors for float weights, .ckpt for a quantized model.
        arch: timm name of the model; inferred from names and sizes when left out.
        reduction_bits: of a quantized Swin, whose weights that merge patches may have other than 8 bits: 8 refuses
            such a file, trained keeps the width.
        eval_permutation: order of tokens in a quantized SReT: portable (default), identity, or a seed.
        force: overwrite the output.
    """

    input: Path
    output: Path
    arch: str | None = None
    reduction_bits: ReductionBits = "8"
    eval_permutation: int | str | None = None
    force: bool = False


def read(path: Path) -> dict[str, Tensor]:
    """The table of weights in a file, out of its container and without ``module.``; QatError if that is ambiguous."""
    if not path.is_file():
        raise QatError(f"no file {path}: give an official .pth or .pth.tar file, or one of VVTQ")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise load_error(path, error) from None
    keys = [str(key) for key in content] if isinstance(content, Mapping) else []
    found = [key for key in CONTAINERS if key in keys]
    if len(found) != 1 or not isinstance(table := content[found[0]], Mapping):
        raise QatError(
            f"{path} has {keys[:5]}: one table, 'model' or 'state_dict', must hold the weights; keep that one"
        )
    for name, value in table.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise QatError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor: keep only the weights")
    if left := [key for key in keys if key not in found]:
        log.info("left out: %s", ", ".join(left))
    return without_prefix(table)


def without_prefix(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One ``module.`` is taken off if all names have it; QatError if only some have."""
    bare = [name for name in table if not name.startswith(MODULE)]
    if bare and len(bare) < len(table):
        raise QatError(f"{bare[0]!r} lacks the prefix {MODULE!r} that other names have: give the table of one model")
    return {name.removeprefix(MODULE): value for name, value in table.items()}


def load_error(path: Path, error: Exception) -> QatError:
    """What a user can do about a file that does not load with ``weights_only=True``."""
    if foreign := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
        return QatError(
            f"{path} holds a {foreign[1]}, which only a loader that may also run code from the file can read: if you "
            "trust it, torch.load it with weights_only=False and torch.save {'state_dict': its weights} to a new file"
        )
    return QatError(f"cannot read {path}, it may be damaged or incomplete: {first_line(error)}")


def check_output(output: Path, source: Path, force: bool) -> None:
    """QatError for an output that cannot, or must not, be written."""
    if output.exists() and source.exists() and output.samefile(source):
        raise QatError(f"{output} is the input: give another OUTPUT")
    if not output.parent.is_dir():
        raise QatError(f"no folder {output.parent} to write {output.name} to: create it first")
    if output.is_dir() or (output.exists() and not force):
        raise QatError(f"{output} exists: give another OUTPUT, or --force to overwrite a file")


def write(converted: Converted, output: Path) -> None:
    """Write the file, complete or not at all; QatError for a suffix that qat would not read it by."""
    card = converted.card
    suffix, kind = (".ckpt", "quantized") if card else (".safetensors", "float")
    if output.suffix != suffix:
        raise QatError(f"OUTPUT is {output}, but the model is {kind}: give a name that ends in {suffix}")
    part = output.with_name(f"{output.name}.part")
    try:
        if card:
            state = {PREFIX + name: value for name, value in converted.state.items()}
            torch.save({**LIGHTNING, KEY: card.to_dict(), "state_dict": state}, part)
        else:
            part.write_bytes(save(converted.state, {"format": "pt"}))  # save_file makes it unreadable for others
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)


def summary(converted: Converted) -> str:
    """Model, widths and counts in a few words."""
    steps = sum(value.numel() for name, value in converted.state.items() if name.endswith("_quant.step"))
    rules = converted.card.rules if converted.card else []
    bits = {rule["match"]: rule["spec"]["init_args"]["bits"] for rule in rules if rule["spec"]}
    kind = f"W{bits['*.weight_quant']}A{bits['*.input_quant']} with {steps} steps" if bits else "float"
    return f"{converted.arch}, {kind}, {len(converted.state)} tensors"


def convert_file(options: Options) -> None:
    """Convert a file, and log what was written."""
    check_output(options.output, options.input, options.force)
    model_args = {} if options.eval_permutation is None else {"eval_permutation": options.eval_permutation}
    converted = convert(read(options.input), options.arch, wnids(), model_args, options.reduction_bits)
    write(converted, options.output)
    log.info("%s: %s", options.output, summary(converted))
