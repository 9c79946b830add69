"""Turn an official DeiT, Swin, SReT or VVTQ checkpoint into a file that qat reads.

qat convert-official deit_tiny_patch16_224-a1311bcf.pth checkpoints/deit_t.safetensors
qat convert-official model_best.pth.tar vvtq_deit_t_w4a4.ckpt

Float weights, official or with the split projections of VVTQ, become a .safetensors file for --model.checkpoint. A
quantized model of VVTQ becomes a .ckpt file that describes itself, for qat validate --ckpt and qat.load; it has no
optimizer state, so no run can resume from it. A file that does not fit exactly is refused, and nothing is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from qat.checkpoint import KEY, PREFIX
from qat.data.folder import wnids
from qat.errors import QatError
from qat.models.torch_file import read_foreign, reason
from qat.models.weights import choose_table, without_prefixes
from qat.official.conversion import Converted, convert
from qat.official.steps import ReductionBits
from qat.runs.writing import replacing

log = logging.getLogger(__name__)
WRITTEN_BY = {"pytorch-lightning_version": "2.5.0"}  # Lightning migrates a checkpoint from this version to its own


@dataclass(frozen=True)
class ConvertOptions:
    """A file to convert.

    Args:
        input: official .pth or .pth.tar file.
        output: .safetensors for float weights, .ckpt for a quantized model.
        arch: timm name of the model; inferred from names and sizes when left out.
        checkpoint_key: which table of weights is read, where the file holds several, for example model_ema; averaged
            weights when left out.
        reduction_bits: width of the weights that merge patches in a quantized Swin: 8 refuses a file with another
            width there, trained keeps that width.
        eval_permutation: order of tokens in a quantized SReT: portable (default), identity, or a seed.
        force: overwrite the output.
    """

    input: Path
    output: Path
    arch: str | None = None
    checkpoint_key: str | None = None
    reduction_bits: ReductionBits = "8"
    eval_permutation: int | str | None = None
    force: bool = False


def read(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The table of weights in a file, without the prefix ``module.``.

    Args:
        path: an official file, or one of VVTQ; objects that it holds beside the weights are not read.
        key: name of the table, where the file holds several; averaged weights are taken first when None.

    Raises:
        QatError: for a file that is missing, damaged, or that needs no conversion, or without a table of weights.
    """
    if not path.is_file():
        raise QatError(f"no file {path}: give an official .pth or .pth.tar file, or one of VVTQ")
    if path.suffix.lower() == ".safetensors":
        raise QatError(f"{path} needs no conversion: give it as --model.checkpoint, with --model.arch NAME")
    try:
        content = read_foreign(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise QatError(f"cannot read {path}, it may be damaged or incomplete: {reason(error)}") from None
    if isinstance(content, Mapping) and KEY in content:
        raise QatError(f"{path} was written by qat and needs no conversion: give it as --ckpt")
    chosen, table = choose_table(content, path, key, "checkpoint_key")
    if left := [str(name) for name in content if chosen in content and name != chosen]:
        log.info("left out: %s", ", ".join(left))
    return without_prefixes(table, path)


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
    with replacing(output, "wb") as file:
        if card:
            state = {PREFIX + name: value for name, value in converted.state.items()}
            buffer = BytesIO()  # on a full disk, torch would hide the system's error behind one of its own
            torch.save({**WRITTEN_BY, KEY: card.to_dict(), "state_dict": state}, buffer)
            file.write(buffer.getbuffer())
        else:
            file.write(save(converted.state, {"format": "pt"}))  # save_file would deny others to read it


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
    converted = convert(
        read(options.input, options.checkpoint_key), options.arch, wnids(), model_args, options.reduction_bits
    )
    write(converted, options.output)
    log.info("%s: %s", options.output, summary(converted))
    if converted.card:
        log.info("next: qat validate --ckpt %s --data.root DIR", options.output)
    else:
        log.info(
            "next: qat validate --model.arch %s --model.checkpoint %s --data.root DIR", converted.arch, options.output
        )
