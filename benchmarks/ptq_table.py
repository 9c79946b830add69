"""The results of `ptq.py` as a table: means over seeds, and intervals of differences that are paired image by image.

A row of results has a bit for every validation image, 1 where the model is right. The difference of two models on one
image is the difference of their bits, averaged over the seeds that both have; ± is 1.96 standard errors of its mean
over the images. Images that both get right, or both wrong, do not widen it.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
from ptq_cases import FRONTIER, GOALS, PUBLISHED, PUBLISHED_FLOAT
from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
SPELLED = (
    "case (images)", "top-1 %", "seeds", "minus float", "minus the other case", "published", "agreement %", "KL",
    "calibration s", "evaluation / float", "MB", "device x jobs", "levels beyond the bits",
)  # fmt: skip


def bits_of(hits: list[bool]) -> str:
    """Bits as hexadecimal digits, the first image in the highest bit; the last digit is filled up with zeros."""
    return np.packbits(np.array(hits, bool)).tobytes().hex()


def hits_of(row: Row, key: str = "hits") -> npt.NDArray[np.float64]:
    """100 for every image that was right, 0 for the others, so that a mean is a percentage."""
    found = np.unpackbits(np.frombuffer(bytes.fromhex(row[key]), np.uint8), count=row["images"])
    return 100 * found.astype(np.float64)


def read(file: Path, arch: str) -> list[Row]:
    """The results of an architecture; lines without a bit for every image, from an older version, are left out."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["arch"] == arch and "hits" in row]


def paired(rows: list[Row], others: list[Row] | None) -> tuple[float, float] | None:
    """The mean difference to other rows, or to float, and half of its 95 % interval; None where no seed is common."""
    if others is None:
        differences = [hits_of(row) - hits_of(row, "float_hits") for row in rows]
    else:
        by_seed = {(row["seed"], row["images"]): hits_of(row) for row in others}
        common = [row for row in rows if (row["seed"], row["images"]) in by_seed]
        differences = [hits_of(row) - by_seed[row["seed"], row["images"]] for row in common]
    if not differences:
        return None
    each = np.mean(differences, axis=0)
    return float(each.mean()), 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5


def lines(rows: list[Row], others: list[Row]) -> list[list[str]]:
    """A line for each case and device.

    Args:
        rows: the results that are shown.
        others: those of the case that they are compared with; empty for none.
    """
    found = []
    for name, device in dict.fromkeys((row["case"], row["device"]) for row in rows):
        same = [row for row in rows if (row["case"], row["device"]) == (name, device)]
        beside = [row for row in others if row["device"] == device]
        found.append(_line(name, same, beside if beside and beside[0]["case"] != name else None))
    return found


def _line(name: str, same: list[Row], others: list[Row] | None) -> list[str]:
    top1 = [row["top1"] for row in same]
    spread = f" ± {stdev(top1):.1f}" if len(top1) > 1 else ""
    published = PUBLISHED.get(name.rpartition(" ")[0]) if same[0]["arch"].startswith("deit_tiny") else None
    held = [row for row in same if row["held"]]
    ratios = [row["ratio"] for row in same if row["ratio"] is not None]
    ways = dict.fromkeys(f"{row['device']} x {row['jobs']}, threads {row['threads']}" for row in same)
    more = sorted({part.split()[0] for part in same[0]["levels"].split("with ")[1:]})
    return [
        name, f"{mean(top1):.1f}{spread}", str(len(same)), _difference(paired(same, None)),
        _difference(paired(same, others)) if others else "",
        "" if published is None else f"{published - PUBLISHED_FLOAT:+.2f} ({published:.2f})",
        f"{mean(row['agreement'] for row in held):.1f}" if held else "",
        f"{mean(row['kl'] for row in held):.3f}" if held else "",
        f"{median(row['seconds'] for row in same):.1f}", f"{median(ratios):.2f}" if ratios else "",
        f"{max(row['megabytes'] for row in same):.0f}", "; ".join(ways),
        ", ".join(more),
    ]  # fmt: skip


def _difference(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def show(header: tuple[str, ...], body: list[list[str]], markdown: bool) -> None:
    """Print a table, without the columns that are empty."""
    used = [i for i in range(len(header)) if any(line[i] for line in body)]
    if markdown:
        rows = [[header[i] for i in used], ["---"] * len(used), *([line[i] for i in used] for line in body)]
        print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for i in used:
        table.add_column(header[i], no_wrap=i == 0)
    for line in body:
        table.add_row(*(line[i] for i in used))
    Console(width=220).print(table)


def goals(rows: list[Row]) -> list[str]:
    """What is asked of `FRONTIER` on 32 images, and what it has reached, as far as there are results."""
    drops: dict[int, float] = {}
    for bits in range(2, 9):
        same = [row for row in rows if row["case"] == f"{FRONTIER} W{bits}A{bits} 32"]
        if same:
            drops[bits] = mean(float(np.mean(hits_of(row, "float_hits") - hits_of(row))) for row in same)
    found = [
        f"W{bits}A{bits}, 32 images: a drop of {drops[bits]:.1f} points; {goal} at most is the goal"
        for bits, goal in GOALS.items() if bits in drops
    ]  # fmt: skip
    worse = [bits for bits in drops if bits - 1 in drops and drops[bits] > drops[bits - 1]]
    return [*found, *(f"W{bits}A{bits} is worse than W{bits - 1}A{bits - 1}" for bits in worse)]
