"""`qat describe`: what is quantized and what it saves, without data, weights, training or Lightning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from torch import nn

from qat import checkpoint
from qat.cli.check_options import check_constructors, check_options, parse_options
from qat.cli.configs import read_old_class_paths, with_bases
from qat.cli.options import plain_parser
from qat.cli.parse import instantiate
from qat.cli.run_of_ckpt import origin_of, run_name
from qat.cli.settle import settle
from qat.cli.summary import command, show
from qat.cli.words import given_configs
from qat.sites.describe import Cost, as_table, cost, describe, summary
from qat.sites.insert import quantize
from qat.training.options import ModelOptions
from qat.training.student import build_student

DESCRIPTION = "Show what is quantized, and what it saves: no data, no weights, no training."
LONGEST = 1000  # characters of a line in a file


def run(verb: str, arguments: Sequence[str]) -> Cost:
    """Print the table of sites and the cost; the steps of a checkpoint are loaded, so that it shows as calibrated."""
    read_old_class_paths()
    parser = plain_parser(verb, DESCRIPTION)
    parser.add_argument("--trainer", type=dict, default={}, help="Not used: a config of another verb may have it.")
    words = with_bases(arguments)
    config, given = parse_options(parser, words, verb, [action.dest for action in parser._actions])
    check_options(verb, config)
    check_constructors(parser, config, config)
    ckpt = config.ckpt
    if ckpt is not None:
        ckpt = origin_of(verb, ckpt, config.runs, run_name(config.name, given_configs(arguments))).ckpt
    settled = settle(verb, config, given, ckpt)
    if settled.ckpt is not None:
        loaded = checkpoint.load(settled.ckpt, config.trust)
        total = show_model(loaded, config.model.arch, config.data.preprocessing["size"], config.full)
        show(command("validate", ckpt=settled.ckpt, data_root=config.data.root or "DIR"))
        return total
    config.model.checkpoint = config.model.checkpoint_key = config.model.quant_checkpoint = None
    options: ModelOptions = instantiate(parser, config).model
    with torch.device("meta"):  # shapes are enough
        student = build_student(options)
        if not student.card.rules:  # the products of a float model are known once it has sites
            quantize(student.model, [])
    total = show_model(student.model, student.card.arch, student.card.preprocessing["size"], config.full)
    if len(files := given_configs(arguments)) == 1 and student.card.rules:
        follows = "fit" if config.calibration.method is None else "calibrate"  # a method of its own: without training
        show(command(follows, config=files[0], data_root=config.data.root or "DIR"))
    return total


def show_model(model: nn.Module, arch: str, size: int, full: bool) -> Cost:
    """Print the table of a model and its cost for an image of ``size`` pixels; ``full``: a line for every site."""
    console = Console()
    table = as_table(describe(model), full)
    if not console.is_terminal:  # a file or a pipe has lines of any length
        widest = console.options.update(width=LONGEST)
        console.width = max(console.width, console.measure(table, options=widest).maximum)
    console.print(table)
    total = cost(model, size)
    show(
        f"{arch}: {summary(model)}",
        f"size {total.size_mb:.2f} MB with weights packed at their width (float32: {total.float_size_mb:.2f} MB); "
        f"bit operations {total.bit_operations / 1e9:.2f} G per image "
        f"(float32: {total.float_bit_operations / 1e9:.2f} G)",
    )
    return total
