"""Every transformer of timm by its name: quantized, or refused, and why.

    python benchmarks/names.py                      -> 2 minutes on 1 core; no weights are downloaded
    python benchmarks/names.py --match 'vit_*clip*'

Each model is built on the device ``meta``, which has shapes and no values, and gets the recipe vvtq. Backbones without
a head get one of 1,000 classes, as ``--model.num_classes 1000`` gives it. docs/models.md has the table.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg, list_modules, model_entrypoint

import qat.models  # noqa: F401  registers the families, and SReT with timm
from qat.errors import QatError
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize

TRANSFORMERS = (  # files of timm with image classifiers whose blocks are attention and MLP
    "vision_transformer", "deit", "eva", "beit", "swin_transformer", "vision_transformer_hybrid", "vitamin",
    "swin_transformer_v2", "swin_transformer_v2_cr", "cait", "xcit", "vision_transformer_relpos",
    "vision_transformer_sam", "naflexvit", "volo", "hiera", "hieradet_sam2", "tiny_vit", "crossvit", "deepseek_vit",
    "gemma4_vit", "qwen3_vit", "convit", "pit", "tnt", "twins",
)  # fmt: skip
CLASSES = 1000


class Tried(NamedTuple):
    """What became of one name: why it was refused, or None."""

    file: str
    kind: str
    name: str
    refused: str | None


def names(match: str) -> Iterator[tuple[str, str]]:
    """File and name of every model that a glob matches, as far as this version of timm has the file."""
    files = set(list_modules())
    yield from (("sret", name) for name in ("sret_tiny",) if fnmatchcase(name, match))
    for file in TRANSFORMERS:
        found = timm.list_models(module=file) if file in files else []
        yield from ((file, name) for name in found if fnmatchcase(name, match))
    towers = [name for name in timm.list_models("*clip*") if _file(name) not in TRANSFORMERS]
    yield from ((_file(name), name) for name in towers if fnmatchcase(name, match))


def _file(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


def tried(file: str, name: str, rules: list[Rule]) -> Tried:
    """Build a model without values and quantize it."""
    cfg = get_pretrained_cfg(name)
    headless = {"num_classes": CLASSES} if cfg is None or not cfg.num_classes else {}
    with torch.device("meta"):
        try:
            model = timm.create_model(name, **headless)
        except RuntimeError as error:  # some old versions read values while they build
            return Tried(file, "?", name, f"timm cannot build it without values: {error}")
        kind = type(model).__name__
        try:
            quantize(model, rules)
        except QatError as error:
            return Tried(file, kind, name, str(error))
    return Tried(file, kind, name, None)


def reason(message: str) -> str:
    """A refusal without the number of a block and without the list of what is known."""
    return re.sub(r"\.\d+", "", message.partition(":")[0].partition(" that qat")[0])


def summary(found: list[Tried]) -> Table:
    """One line for each file and class."""
    groups: dict[tuple[str, str], list[Tried]] = defaultdict(list)
    for one in found:
        groups[one.file, one.kind].append(one)
    table = Table(box=box.MARKDOWN)
    for column in ("timm file", "class", "names", "quantized", "refused, because"):
        table.add_column(column, justify="right" if column in ("names", "quantized") else "left", overflow="fold")
    for (file, kind), members in groups.items():
        reasons = Counter(reason(one.refused) for one in members if one.refused is not None)
        done = sum(one.refused is None for one in members)
        text = "; ".join(f"{count}: {why}" for why, count in reasons.most_common())
        table.add_row(file, kind, str(len(members)), str(done), text)
    done = sum(one.refused is None for one in found)
    table.add_row("all", "", str(len(found)), str(done), str(len(found) - done))
    return table


def main() -> None:
    """Try every name and print the table."""
    parser = argparse.ArgumentParser(description="Every transformer of timm by its name.")
    parser.add_argument("--match", default="*", help="names to try, as a glob (*)")
    parser.add_argument("--each", action="store_true", help="print a line for each name too")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    rules, found, console = build_recipe("vvtq", w_bits=4, a_bits=4), [], Console(width=160)
    for file, name in names(given.match):
        found.append(tried(file, name, rules))
        if given.each:
            console.print(f"{name}: {found[-1].refused or 'quantized'}", highlight=False)
    console.print(f"timm {timm.__version__}", summary(found))


if __name__ == "__main__":
    main()
