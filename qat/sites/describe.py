"""Which sites are quantized, and what the model costs: size of the weights and bit operations."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich import box
from rich.table import Table
from torch import nn

from qat.quantizers import Quantizer
from qat.runs.writing import replacing
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, sites, switched_off
from qat.sites.products import HasProducts

FLOAT_BITS = 32


@dataclass(frozen=True)
class SiteRow:
    """A line of the table."""

    site: str
    quantizer: str
    bits: int
    levels: int | None
    range: str
    granularity: str
    groups: int
    calibrated: bool | None
    snr_db: float | None = None


class Cost(NamedTuple):
    """Size and work of one model."""

    size_mb: float  # every parameter, weights packed at their width, the rest in float32; 1 MB = 10**6 bytes
    float_size_mb: float
    bit_operations: float  # multiply-accumulates times both operand widths, for one image
    float_bit_operations: float


def describe(model: nn.Module, snr_db: Mapping[str, float] | None = None) -> list[SiteRow]:
    """Every site of a model, quantized or not, in the order of the module tree.

    Args:
        model: quantized.
        snr_db: signal-to-noise ratios by name of the site, from `qat.ptq.site_errors`.
    """
    errors = snr_db or {}
    return [replace(_row(name, module), snr_db=errors.get(name)) for name, module in sites(model)]


def _row(name: str, module: nn.Module) -> SiteRow:
    if not isinstance(module, Quantizer):
        return SiteRow(name, "float", FLOAT_BITS, None, "", "", 0, None)
    spec = module.spec
    return SiteRow(
        site=name,
        quantizer=type(spec).__name__,
        bits=spec.width,
        levels=spec.levels,
        range=spec.describe_range(),
        granularity=spec.granularity,
        groups=module.layout.groups,
        calibrated=module.calibrated,
    )


def summary(model: nn.Module) -> str:
    """One line: how many sites have which width, and which have more levels than their width allows."""
    counts: dict[str, Counter[tuple[int, int]]] = {"weights": Counter(), "activations": Counter()}
    for _, module in quantizers(model):
        key = (module.spec.width, max(0, module.spec.levels - 2**module.spec.width))
        counts["activations" if module.layout.batched else "weights"][key] += 1
    parts = [
        f"{kind} {' + '.join(f'{n} at {_width(*width)}' for width, n in sorted(widths.items()))}"
        for kind, widths in counts.items()
        if widths
    ]
    return ", ".join(parts) or "float"


def _width(bits: int, extra: int) -> str:
    return f"{bits} bit" if not extra else f"{bits} bit with {2**bits + extra} levels (more than {bits} bits hold)"


@torch.no_grad()
def cost(model: nn.Module, size: int) -> Cost:
    """Size and bit operations of a model for one image of ``size`` x ``size`` pixels."""
    modules = dict(model.named_modules())
    bits_done = float_bits_done = 0.0
    for name, shape in _input_shapes(model, size):
        for product in cast(HasProducts, modules[name]).products():
            macs, left, right = (
                product.macs(shape),
                modules[f"{name}.{product.left}"],
                modules[f"{name}.{product.right}"],
            )
            bits_done += macs * _bits(left) * _bits(right)
            float_bits_done += macs * FLOAT_BITS**2
    widths = {f"{name.removesuffix('_quant')}": q.spec.width for name, q in quantizers(model) if not q.layout.batched}
    stored = sum(p.numel() * widths.get(name, FLOAT_BITS) for name, p in model.named_parameters())
    stored += FLOAT_BITS * sum(b.numel() for _, q in quantizers(model) for b in q.buffers())  # zero points
    born = [
        m.bias for m in modules.values() if getattr(m, "born_bias", False)
    ]  # zeros unless calibration has filled them
    stored += FLOAT_BITS * sum(bias.numel() for bias in born if not bias.is_meta and bias.any())
    steps = sum(p.numel() for _, q in quantizers(model) for p in q.parameters())
    parameters = sum(p.numel() for p in model.parameters()) - steps
    return Cost(stored / 8e6, parameters * FLOAT_BITS / 8e6, bits_done, float_bits_done)


def _input_shapes(model: nn.Module, size: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name and input shape, for one image, of every call of a module that states its products."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    multiplying = {name: module for name, module in model.named_modules() if hasattr(module, "products")}
    training, reference = model.training, next(model.parameters())
    blank = torch.zeros(1, 3, size, size, device=reference.device, dtype=reference.dtype)
    try:
        with (
            switched_off(module for _, module in quantizers(model)),
            watching(multiplying, before=lambda name, args: shapes.append((name, tuple(args[0].shape)))),
        ):
            model.eval()(blank)
    finally:
        model.train(training)
    return shapes


def _bits(module: nn.Module) -> int:
    return module.spec.width if isinstance(module, Quantizer) else FLOAT_BITS


def write_csv(rows: list[SiteRow], path: Path) -> None:
    """Write the whole table, one line per site; QatError where the file cannot be written."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, [field.name for field in fields(SiteRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def as_table(rows: list[SiteRow], full: bool = False) -> Table:
    """The table, 80 columns wide; sites that differ only in their block number share a line unless ``full``."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("site", overflow="fold")
    for column in ("n", "spec", "levels", "range", "steps", "ready"):
        table.add_column(column, justify="right" if column in ("n", "levels") else "left", no_wrap=True)
    for name, count, row in [(row.site, 1, row) for row in rows] if full else list(_merged(rows)):
        if row.quantizer == "float":
            table.add_row(name, str(count), "float", style="dim")
            continue
        steps = row.granularity if row.granularity == "tensor" else f"{row.groups}, {row.granularity}"
        ready = "yes" if row.calibrated else "no"
        table.add_row(name, str(count), f"{row.quantizer} {row.bits}", str(row.levels), row.range, steps, ready)
    return table


def _merged(rows: list[SiteRow]) -> Iterator[tuple[str, int, SiteRow]]:
    """Sites that differ only in their block number: name with * for the number, how many, and the first of them."""
    groups: dict[tuple[Any, ...], list[SiteRow]] = {}
    for row in rows:
        pattern = re.sub(r"\.\d+\.(\w+\.\d+\.)*", ".*.", row.site)  # layers.0.blocks.1.mlp -> layers.*.mlp, a glob
        groups.setdefault((pattern, *list(asdict(row).values())[1:]), []).append(row)
    for key, members in groups.items():
        yield (key[0] if len(members) > 1 else members[0].site), len(members), members[0]
