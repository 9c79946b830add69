"""Every method of post-training quantization: accuracy, calibration time, evaluation time over float, peak memory.

    python benchmarks/ptq.py --data DIR --checkpoint FILE --out ptq_out        -> an hour on 2 cores for all cases
    python benchmarks/ptq.py ... --only 'repq_vit *' --seeds 0                 -> a minute for each

A case is calibrated on images of DIR/train and evaluated on all of DIR/val, in a process of its own, so that its peak
memory is its own. Results in OUT are kept. Evaluation is compared within one process: the same batches through
the float and the quantized model in turn, median of the ratios. Top-1 is what `qat validate` prints.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qat import build_float, build_recipe, quantize
from qat.callbacks.calibrate import PeakMemory
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.models import default_preprocessing
from qat.ptq import InitSteps, Observe, OutputSearch, PTQMethod, RepQViT
from qat.runs.process import keep_freed_memory
from qat.sites.describe import summary

BATCH = 50
ROUNDS = 2  # repeats of the comparison with the float model


class Case(NamedTuple):
    """A recipe, the method that fills it, widths, and the number of calibration images."""

    recipe: str
    method: PTQMethod
    w_bits: int
    a_bits: int
    images: int

    @property
    def name(self) -> str:
        """Recipe, method, widths and images, as `--only` matches them."""
        kind = getattr(self.method, "observer", type(self.method).__name__)
        return f"{self.recipe} {kind} W{self.w_bits}A{self.a_bits} {self.images}"


FORMS = ("single_16", "single_17", "half_16", "half_17")
CASES = [
    *(Case(f"repq_vit{end}", RepQViT(), bits, bits, 32) for bits in (4, 6, 3) for end in ("", "_released")),
    *(Case(f"bitlog2_{form}{end}", RepQViT(), 4, 4, 32) for end in ("", "_released") for form in FORMS),
    *(Case("uniform_full", Observe(kind), 8, 8, n) for n in (256, 1000) for kind in ("minmax", "percentile", "omse")),
    *(Case(f"fq_vit_{bits}{end}", Observe("minmax"), 8, 8, n)
      for n in (256, 1000) for end in ("", "_released") for bits in ("888", "884")),
    *(Case("uniform", Observe(kind), 4, 4, 256) for kind in ("minmax", "ema", "percentile", "omse")),
    *(Case("uniform", method, n, n, 32) for n in (4, 3) for method in (InitSteps(), RepQViT(), OutputSearch())),
]  # fmt: skip


def pixels(data: ImageNetDataModule, arch: str, out: Path) -> tuple[Tensor, Tensor]:
    """Validation images (n, 3, S, S) uint8 and labels (n,), decoded once."""
    cache = out / f"val_{arch}.pt"
    if not cache.exists():
        data.setup("validate")
        batches = list(data.val_dataloader())
        torch.save((torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])), cache)
    found: tuple[Tensor, Tensor] = torch.load(cache, mmap=True)
    return found


@torch.no_grad()
def run(case: Case, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and evaluate one case."""
    preprocessing = default_preprocessing(args.arch)
    data = ImageNetDataModule(DataOptions(args.data, val_batch_size=BATCH, preprocessing=preprocessing.to_dict()))
    images, labels = pixels(data, args.arch, args.out)
    float_model = build_float(args.arch, args.checkpoint).eval()
    rules = build_recipe(case.recipe, w_bits=case.w_bits, a_bits=case.a_bits)
    model = quantize(build_float(args.arch, args.checkpoint).eval(), rules)
    calibration = [preprocessing.normalize(x) for x in data.calibration_batches(case.images, 32, seed)]
    started = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as memory:
        case.method(model, calibration)
    seconds = time.perf_counter() - started
    batches = [preprocessing.normalize(x) for x in images[: BATCH * 2].split(BATCH)]
    ratios = [_time(model, x) / _time(float_model, x) for _ in range(ROUNDS) for x in batches]
    hits = sum(
        int((model(preprocessing.normalize(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    )
    return {
        "arch": args.arch, "case": case.name, "seed": seed, "top1": 100 * hits / len(labels), "seconds": seconds,
        "ratio": median(ratios), "megabytes": memory.megabytes, "recipe": summary(model),
    }  # fmt: skip


def _time(model: nn.Module, x: Tensor) -> float:
    started = time.perf_counter()
    model(x)
    return time.perf_counter() - started


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each case, with the mean over its seeds."""
    found = Table(box=box.SIMPLE_HEAD)
    for column in ("case (images)", "top-1 %", "seeds", "calibration s", "evaluation / float", "MB", "levels"):
        found.add_column(column, no_wrap=column != "levels")
    for name in dict.fromkeys(row["case"] for row in rows):
        same = [row for row in rows if row["case"] == name]
        top1 = [row["top1"] for row in same]
        spread = f" ± {stdev(top1):.1f}" if len(top1) > 1 else ""
        levels = sorted({part.split()[0] for part in same[0]["recipe"].split("with ")[1:]})
        found.add_row(
            name, f"{mean(top1):.1f}{spread}", str(len(same)), f"{median(row['seconds'] for row in same):.1f}",
            f"{median(row['ratio'] for row in same):.2f}", f"{max(row['megabytes'] for row in same):.0f}",
            f"{', '.join(levels)} at some sites, more than their bits hold" if levels else "within the bits",
        )  # fmt: skip
    return found


def main() -> None:
    """Run the cases that have no result yet, and print all results."""
    keep_freed_memory()  # as the command does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--checkpoint", required=True, help="float weights, a local file")
    parser.add_argument("--arch", default="deit_tiny_patch16_224")
    parser.add_argument("--out", type=Path, default=Path("ptq_out"))
    parser.add_argument("--only", default="*", help="glob over '<recipe> <method> W<bits>A<bits> <images>'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--run", action=argparse.BooleanOptionalAction, default=True, help="or only show the results so far"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case, in a process of its own
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    if args.one:
        (case,) = [case for case in CASES if case.name == args.one]
        row = run(case, args.seeds[0], args)
        with file.open("a", encoding="utf-8") as results:
            results.write(json.dumps(row) + "\n")
        return
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["arch"], row["case"], row["seed"]) for row in rows}
    for case in CASES:
        for seed in args.seeds if args.run else ():
            if fnmatchcase(case.name, args.only) and (args.arch, case.name, seed) not in done:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", case.name, "--seeds", str(seed)]
                subprocess.run(command, check=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [row for row in rows if row["arch"] == args.arch]
    Console(width=140).print(table([row for row in rows if fnmatchcase(row["case"], args.only)]))
    print(f"{args.arch}, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")


if __name__ == "__main__":
    main()
