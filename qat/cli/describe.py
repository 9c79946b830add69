"""`qat describe`: what is quantized and what it saves, without data, weights, training or Lightning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from torch import nn

from qat import checkpoint
from qat.cli.configs import read_old_class_paths, with_bases
from qat.cli.options import plain_parser
from qat.cli.settle import settle
from qat.sites.describe import Cost, as_table, cost, describe, summary
from qat.sites.insert import quantize
from qat.training.options import ModelOptions
from qat.training.student import build_student

DESCRIPTION = "Show what is quantized, and what it saves: no data, no weights, no training."


def run(verb: str, arguments: Sequence[str]) -> Cost:
    """Print the table of sites and the cost; the steps of a checkpoint are loaded, so that it shows as calibrated."""
    read_old_class_paths()
    parser = plain_parser(verb, DESCRIPTION)
    parser.add_argument("--trainer", type=dict, default={}, help="Not used: a config of another verb may have it.")
    words = with_bases(arguments)
    config, given = parser.parse_args(words), parser.parse_args(words, defaults=False)
    settled = settle(verb, config, given, config.ckpt)
    if settled.ckpt is not None:
        model, card = checkpoint.load(settled.ckpt), checkpoint.read(settled.ckpt)[0]
        return show(model, card.arch, card.preprocessing["size"], config.full)
    config.model.checkpoint = config.model.quant_checkpoint = None
    options: ModelOptions = parser.instantiate(config).model
    with torch.device("meta"):  # shapes are enough
        student = build_student(options)
        if not student.card.rules:  # the products of a float model are known once it has sites
            quantize(student.model, [])
    return show(student.model, student.card.arch, student.card.preprocessing["size"], config.full)


def show(model: nn.Module, arch: str, size: int, full: bool) -> Cost:
    """Print the table of a model and its cost for an image of ``size`` pixels; ``full``: a line for every site."""
    console = Console()
    console.print(as_table(describe(model), full))
    total = cost(model, size)
    console.print(f"{arch}: {summary(model)}", highlight=False, soft_wrap=True)
    console.print(
        f"size {total.size_mb:.2f} MB with weights packed at their width (float32: {total.float_size_mb:.2f} MB); "
        f"bit operations {total.bit_operations / 1e9:.2f} G per image "
        f"(float32: {total.float_bit_operations / 1e9:.2f} G)",
        highlight=False,
        soft_wrap=True,
    )
    return total
