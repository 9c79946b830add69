"""Turn an official DeiT, Swin, SReT or VVTQ checkpoint into a file that qat reads.

qat convert-official deit_tiny_patch16_224-a1311bcf.pth checkpoints/deit_t.safetensors
qat convert-official model_best.pth.tar vvtq_deit_t_w4a4.ckpt

Float weights, official or with the split projections of VVTQ, become a .safetensors file for --model.checkpoint. A
quantized model of VVTQ becomes a .ckpt file that describes itself, for qat validate --ckpt and qat.load; it has no
optimizer state, so no run can resume from it. A file that does not fit exactly is refused, and nothing is written.
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
CONTAINERS = ("model", "state_dict")  # keys of the table: official float files, and VVTQ
MODULE = "module."  # the prefix that DataParallel and DistributedDataParallel add
WRITTEN_BY = {"pytorch-lightning_version": "2.5.0"}  # Lightning migrates a checkpoint from this version to its own


@dataclass(frozen=True)
class ConvertOptions:
    """A file to convert.

    Args:
        input: official .pth or .pth.tar file.
        output: .safetensors for float weights, .ckpt for a quantized model.
        arch: timm name of the model; inferred from names and sizes when left out.
        reduction_bits: width of the weights that merge patches in a quantized Swin: 8 refuses a file with another
            width there, trained keeps that width.
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
    """The table of weights in a file, without the prefix ``module.``.

    Raises:
        QatError: for a file that is missing or damaged, that would run code, or in which the table is ambiguous.
    """
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
        if not isinstance(name, str):
            raise QatError(f"{path}: the name {name!r} is not a string: keep only the weights")
        if not isinstance(value, Tensor):
            raise QatError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor: keep only the weights")
    if left := [key for key in keys if key not in found]:
        log.info("left out: %s", ", ".join(left))
    return without_prefix(table)


def without_prefix(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The table with one ``module.`` removed from every name; unchanged if no name has it, QatError if only some do."""
    bare = [name for name in table if not name.startswith(MODULE)]
    if bare and len(bare) < len(table):
        raise QatError(f"{bare[0]!r} lacks the prefix {MODULE!r} that other names have: give the table of one model")
    return {name.removeprefix(MODULE): value for name, value in table.items()}


def load_error(path: Path, error: Exception) -> QatError:
    """The error for a file that does not load with ``weights_only=True``, with what a user can do about it."""
    if foreign := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
        return QatError(
            f"{path} holds a {foreign[1]}, which only a loader that may also run code from the file can read: if you "
            "trust it, torch.load it with weights_only=False and torch.save {'state_dict': its weights} to a new file"
        )
    return QatError(f"cannot read {path}, it may be damaged or incomplete: {first_line(error)}")


def check_output(output: Path, source: Path, force: bool) -> None:
    """Raise QatError for an output that cannot, or must not, be written."""
    if output.exists() and source.exists() and output.samefile(source):
        raise QatError(f"{output} is the input: give another OUTPUT")
    if not output.parent.is_dir():
        raise QatError(f"no folder {output.parent} to write {output.name} to: create it first")
    if output.is_dir() or (output.exists() and not force):
        raise QatError(f"{output} exists: give another OUTPUT, or --force true to overwrite a file")


def write(converted: Converted, output: Path) -> None:
    """Write the whole file or nothing; QatError if qat could not read the file under the suffix of ``output``."""
    card = converted.card
    suffix, kind = (".ckpt", "quantized") if card else (".safetensors", "float")
    if output.suffix != suffix:
        raise QatError(f"OUTPUT is {output}, but the model is {kind}: give a name that ends in {suffix}")
    part = output.with_name(f"{output.name}.part")
    try:
        if card:
            state = {PREFIX + name: value for name, value in converted.state.items()}
            torch.save({**WRITTEN_BY, KEY: card.to_dict(), "state_dict": state}, part)
        else:
            part.write_bytes(save(converted.state, {"format": "pt"}))  # save_file would deny others to read it
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)


def summary(converted: Converted) -> str:
    """Model, widths, and number of steps and tensors in a few words."""
    steps = sum(value.numel() for name, value in converted.state.items() if name.endswith("_quant.step"))
    rules = converted.card.rules if converted.card else []
    bits = {rule["match"]: rule["spec"]["init_args"]["bits"] for rule in rules if rule["spec"]}
    kind = f"W{bits['*.weight_quant']}A{bits['*.input_quant']} with {steps} steps" if bits else "float"
    return f"{converted.arch}, {kind}, {len(converted.state)} tensors"


def convert_file(options: ConvertOptions) -> None:
    """Convert a file, and log what was written.

    Raises:
        QatError: for an input that is no official file, or an output that cannot be written.
    """
    check_output(options.output, options.input, options.force)
    model_args = {} if options.eval_permutation is None else {"eval_permutation": options.eval_permutation}
    converted = convert(read(options.input), options.arch, wnids(), model_args, options.reduction_bits)
    write(converted, options.output)
    log.info("%s: %s", options.output, summary(converted))
