"""Every method of post-training quantization: accuracy, distance to float, calibration time, peak memory.

    python benchmarks/ptq.py --data DIR --checkpoint FILE --out ptq_out        -> hours on 2 cores for all cases
    python benchmarks/ptq.py ... --only 'repq_vit *' --seeds 0                 -> a minute for each
    python benchmarks/ptq.py ... --device cuda --jobs 4 --threads 4            -> four cases at a time on one GPU
    python benchmarks/ptq.py --out ptq_out --only 'ablation/* W4A4 *' --table --against 'ablation/00 uniform W4A4 32'

A case is calibrated on images of DIR/train and evaluated on all of DIR/val, in a process of its own, so that its peak
memory is its own. Agreement with the float model and KL to it are measured on images of DIR/train that the case was not
calibrated on (`--held`): settings can be chosen by them without a look at the validation images. Results in OUT, which
is for one set of images and one file of weights, are kept: a line of JSON for each case and seed, with a bit for every
image that was right. A second start runs what is missing. Evaluation is compared within one process: the same batches
through the float and the quantized model in turn, median of the ratios. With several jobs, and beside other work,
seconds and ratios mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ptq_cases import CASES, Case
from ptq_table import SPELLED, bits_of, goals, lines, read, show
from torch import Tensor, nn
from train_step import device_name

from qat import build_float, build_recipe, quantize
from qat.callbacks.calibrate import PeakMemory
from qat.data.check import cores
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.models import default_preprocessing
from qat.runs.process import keep_freed_memory
from qat.sites.describe import summary

BATCH = 50
HELD_SEED = 2_000_000_000  # no seed of a calibration


class Images:
    """Normalized batches of images of DIR, on the device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.preprocessing = args, default_preprocessing(args.arch)
        workers = max(1, min(cores() // args.jobs, 8))
        options = DataOptions(
            args.data, val_batch_size=BATCH, preprocessing=self.preprocessing.to_dict(), workers=workers
        )
        self.data = ImageNetDataModule(options)

    def calibration(self, count: int, seed: int) -> list[Tensor]:
        """Images (B, 3, S, S) uint8 of train/."""
        return list(self.data.calibration_batches(count, 32, seed))

    def validation(self) -> tuple[Tensor, Tensor]:
        """All images (n, 3, S, S) uint8 of val/ and their labels (n,)."""
        self.data.setup("validate")
        batches = list(self.data.val_dataloader())
        return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])

    def ready(self, images: Tensor) -> list[Tensor]:
        """Batches as a model takes them."""
        return [self.preprocessing.normalize(x.to(self.args.device)) for x in images.split(BATCH)]

    @torch.no_grad()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs (n, C), on the CPU; one batch after the other is on the device."""
        found = [model(batch).float().cpu() for x in images.split(BATCH) for batch in self.ready(x)]
        return torch.cat(found) if found else torch.empty(0, 1)


def prepared(args: argparse.Namespace) -> dict[str, Tensor]:
    """Validation images and labels, images held out of calibration, and the outputs of the float model for both.

    They are decoded and computed once, and kept in a file.
    """
    cache = args.cache / f"ptq_{args.arch}_{args.device}_{args.held}.pt"
    if not cache.exists():
        images = Images(args)
        val, labels = images.validation()
        held = torch.cat(images.calibration(args.held, HELD_SEED)) if args.held else val[:0]
        model = build_float(args.arch, args.checkpoint).eval().to(args.device)
        made = {"val": val, "labels": labels, "held": held}
        made |= {"float_val": images.logits(model, val), "float_held": images.logits(model, held)}
        part = cache.with_suffix(".part")
        torch.save(made, part)
        part.replace(cache)
    found: dict[str, Tensor] = torch.load(cache, mmap=True)
    return found


@torch.no_grad()
def run(case: Case, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and evaluate one case."""
    known, images, device = prepared(args), Images(args), torch.device(args.device)
    float_model = build_float(args.arch, args.checkpoint).eval().to(device)
    rules = build_recipe(case.recipe, case.rules, w_bits=case.w_bits, a_bits=case.a_bits)
    model = quantize(build_float(args.arch, args.checkpoint).eval(), rules).to(device)
    pixels = images.calibration(case.images, seed)
    calibration = [images.preprocessing.normalize(x.to(device)) for x in pixels]
    with PeakMemory(device) as memory:
        seconds = timed(lambda: case.method(model, calibration), device)
    few = images.ready(known["val"][: BATCH * 2])
    ratios = [
        timed(partial(model, x), device) / timed(partial(float_model, x), device)
        for _ in range(args.rounds)
        for x in few
    ]
    hits = images.logits(model, known["val"]).argmax(1) == known["labels"]
    float_hits = known["float_val"].argmax(1) == known["labels"]
    return {
        "arch": args.arch, "case": case.name, "seed": seed, "device": args.device,
        "machine": device_name() if args.device == "cuda" else f"CPU, {cores()} cores", "torch": torch.__version__,
        "threads": args.threads, "jobs": args.jobs, "seconds": seconds, "megabytes": memory.megabytes,
        "ratio": median(ratios) if ratios else None, "top1": 100 * hits.float().mean().item(), "images": len(hits),
        "hits": bits_of(hits.tolist()), "float_hits": bits_of(float_hits.tolist()),
        **distance(images, model, known, pixels), "levels": summary(model), "method": repr(case.method),
        "report": dict(case.method.report),
    }  # fmt: skip


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes, on a GPU to its end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def distance(images: Images, model: nn.Module, known: dict[str, Tensor], used: list[Tensor]) -> dict[str, Any]:
    """How far the model is from float on the images that were held out, less those that it was calibrated on."""
    seen = {hash(x.numpy().tobytes()) for batch in used for x in batch}
    rest = [i for i, x in enumerate(known["held"]) if hash(x.numpy().tobytes()) not in seen]
    if not rest:
        return {"held": 0}
    target, found = known["float_held"][rest], images.logits(model, known["held"][rest])
    kl = (target.softmax(1) * (target.log_softmax(1) - found.log_softmax(1))).sum(1).mean()
    agreement = (target.argmax(1) == found.argmax(1)).float().mean()
    return {"held": len(rest), "agreement": 100 * agreement.item(), "kl": kl.item()}


def run_all(wanted: list[tuple[Case, int]], args: argparse.Namespace) -> bool:
    """Run cases, some at a time, each in a process of its own; whether all of them came to a result."""

    def start(number: int, case: Case, seed: int) -> bool:
        words = [sys.executable, __file__, *sys.argv[1:], "--one", case.name, "--seeds", str(seed)]
        done = subprocess.run([*words, "--threads", str(args.threads)], capture_output=True, text=True)
        last = ((done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no message"])[-1]
        print(f"[{number}/{len(wanted)}] {case.name}, seed {seed}: {last}", flush=True)
        if done.returncode:
            with (args.out / "errors.txt").open("a", encoding="utf-8") as errors:
                errors.write(f"{case.name}, seed {seed}\n{done.stderr}\n")
        return done.returncode == 0

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(start, i, case, seed) for i, (case, seed) in enumerate(wanted, 1)]
        return all(job.result() for job in jobs)  # the end of the block waits for every one of them


def run_one(args: argparse.Namespace) -> None:
    """Run the case of this process and add its line to the results."""
    (case,) = [case for case in CASES if case.name == args.one]
    row = run(case, args.seeds[0], args)
    line = (json.dumps(row) + "\n").encode()
    file = os.open(args.out / "results.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, line)  # one call, so that lines of several jobs do not mix
    os.close(file)
    print(f"{row['top1']:.1f} %, calibrated in {row['seconds']:.1f} s")


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--checkpoint", help="float weights, a local file")
    parser.add_argument("--arch", default="deit_tiny_patch16_224")
    parser.add_argument("--out", type=Path, default=Path("ptq_out"), help="folder of the results")
    parser.add_argument("--cache", type=Path, help="folder of decoded images; OUT when not given")
    parser.add_argument("--only", default="*", help="glob over '<recipe> <method> W<bits>A<bits> <images>'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration images")
    parser.add_argument("--held", type=int, default=200, help="training images held out of calibration")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="cases that run at a time")
    parser.add_argument("--threads", type=int, help="of each; the cores are shared by the jobs when not given")
    parser.add_argument("--rounds", type=int, default=2, help="of timing evaluation; 0 beside other work")
    parser.add_argument("--table", action="store_true", help="only show the results so far")
    parser.add_argument("--against", help="name of a case that the others are compared with, image by image")
    parser.add_argument("--markdown", action="store_true", help="show the results as markdown")
    parser.add_argument("--list", action="store_true", help="only list the names of the cases")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case, in a process of its own
    args = parser.parse_args()
    if not (args.table or args.list) and not (args.data and args.checkpoint):
        parser.error("give --data and --checkpoint, or --table to see the results so far")
    if args.against not in (None, *(case.name for case in CASES)):
        parser.error(f"--against {args.against!r} is no case: --list shows their names")
    args.cache, args.threads = args.cache or args.out, args.threads or max(1, torch.get_num_threads() // args.jobs)
    return args


def main() -> int:
    """Run the cases that have no result yet, and print all results."""
    keep_freed_memory()  # as the command does
    args = options()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # convolutions compute as on a CPU
    cases = [case for case in CASES if fnmatchcase(case.name, args.only)]
    if args.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_one(args)
        return 0
    file, complete = args.out / "results.jsonl", True
    if not args.table:
        done = {(row["case"], row["seed"], row["device"]) for row in read(file, args.arch)}
        wanted = [(case, n) for n in args.seeds for case in cases if (case.name, n, args.device) not in done]
        if wanted:
            prepared(args)  # before the jobs, each of which reads it
        complete = run_all(wanted, args)
    rows = read(file, args.arch)
    order = [case.name for case in cases]
    shown = sorted((row for row in rows if row["case"] in order), key=lambda row: order.index(row["case"]))
    show(SPELLED, lines(shown, [row for row in rows if row["case"] == args.against]), args.markdown)
    print(*goals(rows), sep="\n")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
